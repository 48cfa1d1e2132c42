// Target attributes: the package is built for any x86-64 processor, so each function names the instructions that it uses.
//
// The processor is asked what it runs before any of these functions is called (see simd_levels.cpp). A function is inlined
// only into functions whose target holds all of its instructions.
#pragma once

#define SPADE_INLINE inline __attribute__((always_inline))

// The instructions that every SIMD level needs: packing and refining are compiled for them.
#define SPADE_TARGET_AVX2 __attribute__((target("avx2,fma,f16c")))

// Makes the compiler compute `x` here and in this form: it neither moves nor regroups what `x` is made of.
#define SPADE_PIN(x) asm("" : "+x"(x))
