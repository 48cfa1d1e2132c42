// Instructions are asked for function by function: the package is built for any x86-64, and looks at the processor.
#pragma once

#define SPADE_INLINE inline __attribute__((always_inline))
// What all units stand on.
#define SPADE_AVX2 __attribute__((target("avx2,fma,f16c")))
// Keeps the compiler from moving or regrouping what makes `x`: sums in registers stay there.
#define SPADE_HOLD(x) asm("" : "+x"(x))
