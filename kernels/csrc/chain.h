// A call on a chain of layers: filled by python_chain.cpp and for frozen nets, read by chain.cpp.
#pragma once
#include <cstdint>

struct ChainLayer {
    const int32_t* plan;
    int64_t plan_size, rows, nnz;
    const void *values, *bias;  // bias: null if none
    void* input;                // packed input of the layer; written by forward, read by backward
    void *gvalues, *gbias;      // null where not needed
    void* ginput;               // backward of hidden layers: packed gradient of the input
};

struct ChainMatrix {  // the caller's, (batch, features)
    void* data;
    int64_t stride, batch_minor;  // from sample to sample or, where batch-minor, from feature to feature
};

struct ChainArgs {
    int64_t is_double, threads, layers, batch, features;
    ChainMatrix x, y;   // forward: input and output; backward: gy, and gx, whose data is null where not needed
    ChainMatrix input;  // backward: x, where forward did not save it
    void* packed_gy;    // backward: gy is packed to here
    int64_t inference;  // forward: nobody reads the inputs of layers again
};
