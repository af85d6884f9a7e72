// The words of a plan while they are written.
#pragma once
#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <new>
#include <utility>
#include <vector>

#include "plan.h"
#include "team.h"

constexpr int32_t kMagic = 0x51a70003;  // the last digits count the formats

struct Header {  // of a plan: offsets in words, 0 where there is nothing
    int32_t magic, size, out_features, in_features, nnz, phases, crow_indices, columns;
    Taps taps;  // zeros: of a linear layer
};

enum Word { FORWARD = sizeof(Header) / 4, SCHEDULE = 12, TRANSPOSE = FORWARD + SCHEDULE };

class Writer {  // of words in memory that is given away as it is: what is large is written there, once
  public:
    Writer(int32_t out_features, int32_t in_features, int32_t nnz, int32_t phases, const Taps& taps)
        : header{kMagic, 0, out_features, in_features, nnz, phases, 0, 0, taps} {
        grow(TRANSPOSE + SCHEDULE * phases + int64_t(nnz) * 3 + 16 * kSlack);  // with few segments enough for all
        size_ = TRANSPOSE + SCHEDULE * phases;
        std::fill_n(words_, size_, 0);
    }
    ~Writer() { std::free(words_); }
    // Room for an array: where it begins. What pointed into the words may no longer do so.
    template <class E>
    int32_t room(int64_t count) {
        const int64_t bytes = count * sizeof(E), at = (size_ + 15) / 16 * 16, end = at + (bytes + 3) / 4 + kSlack;
        if (end > capacity_) grow(std::max(end, 2 * capacity_));
        std::fill(words_ + size_, words_ + at, 0);
        std::fill(words_ + at + bytes / 4, words_ + end, 0);
        size_ = end;
        return static_cast<int32_t>(at);
    }
    template <class E>
    E* array(int32_t at) { return reinterpret_cast<E*>(words_ + at); }
    template <class E>
    int32_t append(const E* items, int64_t count) {
        const int32_t at = room<E>(count);
        std::copy_n(items, count, array<E>(at));
        return at;
    }
    template <class E>
    int32_t append(const std::vector<E>& items) { return append(items.data(), items.size()); }
    int64_t give(int32_t** to) {
        header.size = int32_t(size_);
        std::memcpy(words_, &header, sizeof header);
        *to = std::exchange(words_, nullptr);
        return size_;
    }
    Header header;

  private:
    void grow(int64_t capacity) {
        int32_t* words = static_cast<int32_t*>(std::aligned_alloc(64, (capacity * 4 + 63) / 64 * 64));
        if (!words) throw std::bad_alloc();
        expect_writes(words, capacity * 4);
        if (size_) std::memcpy(words, words_, size_ * 4);
        std::free(words_);
        words_ = words, capacity_ = capacity;
    }
    int32_t* words_ = nullptr;
    int64_t size_ = 0, capacity_ = 0;
};
