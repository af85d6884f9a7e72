// A call on a chain of layers: filled by python_chain.cpp, and by chain.cpp for frozen nets; read by chain.cpp and
// chain_backward.cpp.
//
// Tensors are of one element type. What is packed is of fp64 or fp32, in which sums are taken; 16 bits are for what is kept.
#pragma once
#include <cstdint>

enum Element : int64_t { FLOAT32, FLOAT64, BFLOAT16, FLOAT16 };

struct ChainLayer {
    const int32_t* plan;
    int64_t plan_size, rows, nnz;
    const void *values, *bias;  // bias: null if none
    void* input;                // packed input of the layer; written by forward, read by backward
    void *gvalues, *gbias;      // null where not needed
    void* ginput;               // backward of hidden layers: packed gradient of the input
    void* kept;                 // the input in 16 bits, written by forward; else null: the input itself is kept, or nothing
};

struct ChainMatrix {  // the caller's, (batch, features)
    void* data;
    int64_t stride, batch_minor;  // from sample to sample or, where batch-minor, from feature to feature
};

struct ChainArgs {
    int64_t element, threads, layers, batch, features;
    ChainMatrix x, y;   // forward: input and output; backward: gy, and gx, whose data is null where not needed
    ChainMatrix input;  // backward: x, where forward did not save it
    void* packed_gy;    // backward: gy is packed to here
    int64_t inference;  // forward: nobody reads the inputs of layers again
};
