// Built with -march=x86-64-v3: AVX2 and FMA.
#include "library.h"
