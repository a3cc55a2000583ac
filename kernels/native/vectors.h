// Sixteen fp32 lanes, as one AVX-512 register or two AVX2 ones, and the scalar functions that loops over lanes use.
//
// Every result is the same bits on both: products and sums are fused only where fused() or v_fma says so
// (-ffp-contract=off), a sum over lanes always folds 16 -> 8 -> 4 -> 2 -> 1, and exp is our own polynomial.
#pragma once
#include <immintrin.h>
#include <math.h>
#include <stdint.h>
#include <string.h>

#define LANES 16
#define INLINE static inline __attribute__((always_inline))

#if defined(__AVX512F__)
typedef __m512 lanes;
INLINE lanes v_zero(void) { return _mm512_setzero_ps(); }
INLINE lanes v_set(float x) { return _mm512_set1_ps(x); }
INLINE lanes v_load(const float *p) { return _mm512_loadu_ps(p); }
INLINE void v_store(float *p, lanes x) { _mm512_storeu_ps(p, x); }
INLINE lanes v_fma(lanes a, lanes b, lanes c) { return _mm512_fmadd_ps(a, b, c); }
INLINE lanes v_mul(lanes a, lanes b) { return _mm512_mul_ps(a, b); }
INLINE lanes v_add(lanes a, lanes b) { return _mm512_add_ps(a, b); }
INLINE lanes v_load_bf16(const uint16_t *p) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)p)), 16));
}
INLINE lanes v_load_int8(const int8_t *p) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)p)));
}
#else
typedef struct { __m256 lo, hi; } lanes;
INLINE lanes v_zero(void) { return (lanes){_mm256_setzero_ps(), _mm256_setzero_ps()}; }
INLINE lanes v_set(float x) { return (lanes){_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
INLINE lanes v_load(const float *p) { return (lanes){_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
INLINE void v_store(float *p, lanes x) { _mm256_storeu_ps(p, x.lo), _mm256_storeu_ps(p + 8, x.hi); }
INLINE lanes v_fma(lanes a, lanes b, lanes c) {
    return (lanes){_mm256_fmadd_ps(a.lo, b.lo, c.lo), _mm256_fmadd_ps(a.hi, b.hi, c.hi)};
}
INLINE lanes v_mul(lanes a, lanes b) { return (lanes){_mm256_mul_ps(a.lo, b.lo), _mm256_mul_ps(a.hi, b.hi)}; }
INLINE lanes v_add(lanes a, lanes b) { return (lanes){_mm256_add_ps(a.lo, b.lo), _mm256_add_ps(a.hi, b.hi)}; }
INLINE __m256 half_bf16(const uint16_t *p) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)p)), 16));
}
INLINE lanes v_load_bf16(const uint16_t *p) { return (lanes){half_bf16(p), half_bf16(p + 8)}; }
INLINE __m256 half_int8(const int8_t *p) {
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)p)));
}
INLINE lanes v_load_int8(const int8_t *p) { return (lanes){half_int8(p), half_int8(p + 8)}; }
#endif

INLINE float fused(float a, float b, float c) { return __builtin_fmaf(a, b, c); }

// Sum of 16 values in the one order used everywhere.
INLINE float fold(const float *x) {
    float e[8], f[4];
    for (int i = 0; i < 8; i++) e[i] = x[i] + x[i + 8];
    for (int i = 0; i < 4; i++) f[i] = e[i] + e[i + 4];
    return (f[0] + f[2]) + (f[1] + f[3]);
}

// e^x within 2 ulp: 0 below -87.3, held at e^88.3 above, NaN for NaN. Cody-Waite reduction, the polynomial of Cephes' expf.
INLINE float exponential(float x) {
    float y = x < 88.3f ? x : 88.3f;
    y = y > -87.3f ? y : -87.3f;
    float n = __builtin_rintf(y * 1.44269504f);
    float r = fused(n, -0.693359375f, y);
    r = fused(n, 2.12194440e-4f, r);
    float p = 1.9875691500e-4f;
    p = fused(p, r, 1.3981999507e-3f);
    p = fused(p, r, 8.3334519073e-3f);
    p = fused(p, r, 4.1665795894e-2f);
    p = fused(p, r, 1.6666665459e-1f);
    p = fused(p, r, 5.0000001201e-1f);
    p = fused(p, r * r, r) + 1.0f;
    union { int32_t i; float f; } scale = {.i = ((int32_t)n + 127) << 23};
    float e = p * scale.f;
    e = x < -87.3f ? 0.0f : e;
    return x != x ? x : e;
}

INLINE float from_bf16(uint16_t x) {
    union { uint32_t i; float f; } bits = {.i = (uint32_t)x << 16};
    return bits.f;
}

// To nearest, ties to even; NaN stays NaN.
INLINE uint16_t to_bf16(float x) {
    union { float f; uint32_t i; } bits = {.f = x};
    if (x != x) return (uint16_t)(bits.i >> 16 | 0x40);
    return (uint16_t)((bits.i + 0x7fff + (bits.i >> 16 & 1)) >> 16);
}
