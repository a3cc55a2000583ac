// What is computed row by row: RMS norm, rotary embedding (with the norm of queries and keys), storing K and V.
#pragma once
#include "vectors.h"

// y = x / sqrt(mean(x^2) + eps) * weight; the squares are summed in 16 interleaved chains.
INLINE void rms_norm(const float *x, const float *weight, float *y, int size, float eps) {
    float part[LANES] = {0};
    for (int i = 0; i < size; i += LANES)
        for (int l = 0; l < LANES; l++) part[l] = fused(x[i + l], x[i + l], part[l]);
    const float inverse = 1.0f / sqrtf(fold(part) / (float)size + eps);
    for (int i = 0; i < size; i++) y[i] = x[i] * inverse * weight[i];
}

// Half-split rotary embedding: (a, b) -> (a cos - b sin, b cos + a sin), a and b the halves of the head.
INLINE void rotate(float *x, const float *cos, const float *sin, int half) {
    for (int i = 0; i < half; i++) {
        const float a = x[i], b = x[i + half];
        x[i] = fused(a, cos[i], -(b * sin[i]));
        x[i + half] = fused(b, cos[i], a * sin[i]);
    }
}

// Writes one token's K (a column of (head_dim, 16)) and V (a row of (16, head_dim)) into its page.
INLINE void store_kv(void *keys, void *values, int place, const float *k, const float *v, int head_dim, int bf16) {
    for (int d = 0; d < head_dim; d++) {
        if (bf16) {
            ((uint16_t *)keys)[d * PAGE + place] = to_bf16(k[d]);
            ((uint16_t *)values)[place * head_dim + d] = to_bf16(v[d]);
        } else {
            ((float *)keys)[d * PAGE + place] = k[d];
            ((float *)values)[place * head_dim + d] = v[d];
        }
    }
}
