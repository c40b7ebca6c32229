// What another architecture replaces in train_megalodon.c, and Megalodon's values of it. dev/gecko/gecko.c defines
// OTHER_ARCHITECTURE and its own values, and then includes train_megalodon.c. So that file has no line about Gecko.
#ifndef OTHER_ARCHITECTURE
#define ARCHITECTURE "megalodon" // in files
#define TITLE "Megalodon"
#define HOME ""                  // from the program's folder to that of train_megalodon.c
#define ROPE_BASE 10000          // default of --rope-base
#define MORE_MODEL_OPTIONS(X)    // rows of the tables
#define MORE_ACTIVATIONS(X)
#define MORE_CARRIED(X)
#define MORE_CACHED(X)
#define MORE_FLOPS(c) 0          // of a token
#define AFFINES 2                // affine maps of z: for q and k
#define OMEGA_SIZE D             // weights omega of CEMA
#define GAMMA_STD 1              // of CEMA's gamma at the start
#define ONE 1                    // dimensions of one element, in the released shapes
#define OF_MODEL(function) function
#define MORE_DECLARATIONS
#define MORE_GPU_DECLARATIONS        // these four are train_megalodon.cu's
#define MORE_SCRATCH                 // uses of scratch memory
#define MORE_MEMORY(T, of_element) 0 // its bytes, for T timesteps
#define CHUNKS_CACHED 1              // chunks of keys and values that a stream keeps
#define OTHER_WEIGHTS(o, architecture) false // whether weights of that architecture can be used

// The released configurations. Their exact numbers of parameters are 220,627,968; 1,342,832,640; 1,327,628,288;
// 7,117,381,632; 7,385,817,088; and the last again, with the paper's chunks and rotary base.
#define PRESET_NAMES "tiny mega200M mega1.3B mega1.3B_pg19 mega7.1B mega7.3B paper7B"
#define PRESETS \
    /*                   L    D   H    Z     V      F     c   G   N  vocab   base   eps  swiglu scale share rescale */ \
    {"mega200M",      {12, 1024, 1,  256, 2048,  2560, 2048, 32, 16, 32000, 10000,  1e-5, 0, 0, 0, 0}}, \
    {"mega1.3B",      {24, 2048, 2,  512, 4096,  4864, 2048, 64, 16, 32000, 10000,  1e-5, 0, 0, 0, 0}}, \
    {"mega1.3B_pg19", {24, 2048, 2,  512, 4096,  3584, 2048, 64, 16, 32000, 10000,  1e-5, 1, 1, 1, 0}}, \
    {"mega7.1B",      {32, 4096, 4, 1024, 8192, 11264, 2048, 64, 16, 32000, 10000,  1e-5, 0, 0, 0, 0}}, \
    {"mega7.3B",      {32, 4096, 4, 1024, 8192,  8192, 2048, 64, 16, 32000, 10000,  1e-5, 1, 0, 0, 0}}, \
    {"paper7B",       {32, 4096, 4, 1024, 8192,  8192, 4096, 64, 16, 32000, 100000, 1e-5, 1, 0, 0, 0}},
#endif
