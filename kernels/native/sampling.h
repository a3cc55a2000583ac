// Seeded sampling, as kernels/gumbel.py defines it: argmax over the allowed tokens of z + T G(seed, position, id).
#pragma once
#include "vectors.h"

#define MAX_TOP_K 256
#define NOT_FINITE (-1)
#define NOT_HERE (-2)  // a rule that is left to kernels/gumbel.py

struct sampling {
    double temperature, top_p;
    uint64_t seed;
    int64_t top_k;
    const uint32_t *allowed;  // a bit a token, or NULL
    int32_t position;
};

INLINE uint64_t philox(uint64_t seed, uint32_t position, uint32_t id) {
    uint32_t c0 = position, c1 = id, c2 = 0, c3 = 0, k0 = (uint32_t)seed, k1 = (uint32_t)(seed >> 32);
    for (int round = 0; round < 10; round++) {
        const uint64_t p0 = (uint64_t)0xD2511F53u * c0, p1 = (uint64_t)0xCD9E8D57u * c2;
        c0 = (uint32_t)(p1 >> 32) ^ c1 ^ k0, c1 = (uint32_t)p1;
        c2 = (uint32_t)(p0 >> 32) ^ c3 ^ k1, c3 = (uint32_t)p0;
        k0 += 0x9E3779B9u, k1 += 0xBB67AE85u;
    }
    return c0 | (uint64_t)c1 << 32;
}

static double gumbel(uint64_t word) {
    const double u = ((double)(word >> 12) + 0.5) * 0x1p-52;
    return -log(-log1p(-u));
}

// Largest of the row, NaN if one is.
static float largest(const float *z, int size) {
    float part[LANES];
    int bad[LANES] = {0};
    for (int l = 0; l < LANES; l++) part[l] = -INFINITY;
    int i = 0;
    for (; i + LANES <= size; i += LANES)
        for (int l = 0; l < LANES; l++) {
            part[l] = z[i + l] > part[l] ? z[i + l] : part[l];
            bad[l] |= z[i + l] != z[i + l];
        }
    for (; i < size; i++) {
        part[0] = z[i] > part[0] ? z[i] : part[0];
        bad[0] |= z[i] != z[i];
    }
    float most = part[0];
    int any = bad[0];
    for (int l = 1; l < LANES; l++) most = part[l] > most ? part[l] : most, any |= bad[l];
    return any ? NAN : most;
}

static int first_of(const float *z, int size, float value) {
    for (int i = 0; i < size; i++)
        if (z[i] == value) return i;
    return NOT_FINITE;
}

// `second`: the best score of another token, as far as it was looked for.
struct best { double score, second; int token; };

INLINE void offer_score(struct best *best, int token, double score) {
    if (token == best->token) return;
    if (score > best->score || (score == best->score && token < best->token))
        *best = (struct best){score, best->score, token};
    else if (score > best->second)
        best->second = score;
}

INLINE void offer(struct best *best, const struct sampling *s, const float *z, int token, uint64_t word) {
    offer_score(best, token, (double)z[token] + s->temperature * gumbel(word));
}

// A token beats a score B only if u < 1 - exp(-e^-g) < e^-g with g = (B - z) / T: nearly all fail that, and need no
// logarithm. `slack` covers the rounding of this test to fp32.
static struct best sample_all(const struct sampling *s, const float *z, int size, float most, int seconds) {
    struct best best = {-INFINITY, -INFINITY, NOT_FINITE};
    const int start = first_of(z, size, most);
    offer(&best, s, z, start, philox(s->seed, s->position, start));
    for (int first = 0; first < size; first += LANES) {
        const int count = size - first < LANES ? size - first : LANES;
        const float bound = (float)(seconds ? best.second : best.score), inverse = (float)(1.0 / s->temperature);
        const float slack = (fabsf(bound) + fabsf(most)) * 1e-6f * inverse + 1e-3f;
        uint64_t words[LANES];
        int hopeful[LANES], any = 0;
        for (int l = 0; l < LANES; l++) words[l] = philox(s->seed, s->position, first + l);
        for (int l = 0; l < count; l++) {
            const float u = (float)(uint32_t)(words[l] >> 32) * 0x1p-32f;
            hopeful[l] = bound == -INFINITY || u <= exponential((z[first + l] - bound) * inverse + slack) * 1.001f;
        }
        for (int l = 0; l < count; l++) any |= hopeful[l];
        if (!any) continue;
        for (int l = 0; l < count; l++)
            if (hopeful[l] && z[first + l] > -INFINITY) offer(&best, s, z, first + l, words[l]);
    }
    return best;
}

// The k largest, falling, ties to the lower ids; then the smallest prefix whose share reaches top_p.
static struct best sample_top(const struct sampling *s, const float *z, int size) {
    int ids[MAX_TOP_K] = {0}, count = 0;
    for (int i = 0; i < size; i++) {
        if (count == s->top_k && z[i] <= z[ids[count - 1]]) continue;
        if (z[i] == -INFINITY) continue;
        int at = count < s->top_k ? count++ : count - 1;
        for (; at > 0 && z[ids[at - 1]] < z[i]; at--) ids[at] = ids[at - 1];
        ids[at] = i;
    }
    if (s->top_p < 1) {
        double cumulative[MAX_TOP_K], sum = 0;
        for (int i = 0; i < count; i++)
            cumulative[i] = sum += exp(((double)z[ids[i]] - (double)z[ids[0]]) / s->temperature);
        int kept = 0;
        while (kept < count - 1 && cumulative[kept] < s->top_p * sum) kept++;
        count = kept + 1;
    }
    struct best best = {-INFINITY, -INFINITY, NOT_FINITE};
    for (int i = 0; i < count; i++) offer(&best, s, z, ids[i], philox(s->seed, s->position, ids[i]));
    return best;
}

static struct best sample_greedily(const float *z, int size, float most, int seconds) {
    struct best best = {most, -INFINITY, first_of(z, size, most)};
    for (int i = 0; i < size && seconds; i++)
        if (i != best.token && z[i] > best.second) best.second = z[i];
    return best;
}

// `margin`: NULL, or where to write by how much the token's score leads the next one's.
static int sample_row(const struct sampling *s, float *z, int size, float *margin) {
    if (s->allowed)
        for (int i = 0; i < size; i++) z[i] = s->allowed[i / 32] >> i % 32 & 1 ? z[i] : -INFINITY;
    const float most = largest(z, size);
    if (!isfinite(most)) return NOT_FINITE;
    const int top = s->top_k > 0 && s->top_k < size;
    if (s->temperature > 0 && (top ? s->top_k > MAX_TOP_K : s->top_p < 1)) return NOT_HERE;
    const struct best best = s->temperature == 0 ? sample_greedily(z, size, most, margin != NULL)
        : top ? sample_top(s, z, size) : sample_all(s, z, size, most, margin != NULL);
    if (margin) *margin = (float)(best.score - best.second);
    return best.token;
}
