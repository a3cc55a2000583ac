// Built with -march=x86-64-v4: AVX-512.
#include "library.h"
