// Attention of a few rows over paged keys and values, in chunks of 64 keys at fixed positions (online softmax:
// Milakov and Gimelshein, arXiv 1805.02867).
//
// A row's result depends on its own keys only: chunks start at multiples of 64 of the *position*, a score is one chain
// over the head's elements, weights and outputs are chains over the keys in order. A page holds 16 keys: K as
// (head_dim, 16), so that 16 scores stand side by side, V as (16, head_dim).
#pragma once
#include "vectors.h"

#define PAGE 16
#define CHUNK 64
#define CHUNK_PAGES (CHUNK / PAGE)
#define MAX_HEAD_DIM 256
#define MAX_QUERIES 64  // queries (rows times heads of a group) of one call

#if defined(__AVX512F__)
#define TILE_QUERIES 4
#else
#define TILE_QUERIES 1
#endif

// Where the pages of one sequence, layer and kv head are. Pages from `tail` on stand in `tails`, one after another.
struct pages {
    const void *keys, *values, *tails;
    const int32_t *table;
    int64_t page_stride;  // elements
    int32_t tail, head_dim, bf16;
};

struct queries {
    const float *q[MAX_QUERIES];  // (head_dim)
    float *out[MAX_QUERIES];      // (head_dim)
    int32_t position[MAX_QUERIES];
    int32_t count, window;  // window 0: none
    float scale;
};

INLINE const void *page_at(const struct pages *p, int page, int limit, int values) {
    const size_t size = p->bf16 ? 2 : 4;
    if (page >= limit) page = -1;  // not there: any readable page does, its keys are hidden
    if (page >= p->tail)
        return (const char *)p->tails + ((size_t)(page - p->tail) * 2 + values) * PAGE * p->head_dim * size;
    const int64_t index = page < 0 ? 0 : p->table[page];
    return (const char *)(values ? p->values : p->keys) + index * p->page_stride * size;
}

INLINE lanes load_kv(const void *p, size_t index, int bf16) {
    return bf16 ? v_load_bf16((const uint16_t *)p + index) : v_load((const float *)p + index);
}

// Pages stand far from each other, so that the processor does not see by itself what comes next.
INLINE void fetch(const void *p, size_t index, int bf16) {
    _mm_prefetch((const char *)p + index * (bf16 ? 2 : 4), _MM_HINT_T0);
}

// scores[i][j] = scale * q_i . k_j for a chunk's 64 keys.
INLINE void score(const float *const *q, const void *const *pages, const void *const *next, int head_dim, float scale,
                  float (*scores)[CHUNK], const int rows, const int bf16) {
    lanes acc[TILE_QUERIES][CHUNK_PAGES];
    for (int i = 0; i < rows; i++)
        for (int p = 0; p < CHUNK_PAGES; p++) acc[i][p] = v_zero();
    for (int d = 0; d < head_dim; d++) {
        lanes k[CHUNK_PAGES];
        for (int p = 0; p < CHUNK_PAGES; p++) k[p] = load_kv(pages[p], (size_t)d * PAGE, bf16);
        for (int p = 0; p < CHUNK_PAGES; p++) fetch(next[p], (size_t)d * PAGE, bf16);
        for (int i = 0; i < rows; i++) {
            const lanes value = v_set(q[i][d]);
            for (int p = 0; p < CHUNK_PAGES; p++) acc[i][p] = v_fma(value, k[p], acc[i][p]);
        }
    }
    for (int i = 0; i < rows; i++)
        for (int p = 0; p < CHUNK_PAGES; p++) v_store(scores[i] + p * PAGE, v_mul(acc[i][p], v_set(scale)));
}

// out[i] += sum over the keys j from `low` up to `high` of weights[i][j] v_j, elements first ... first + 16 width.
INLINE void weigh(float (*weights)[CHUNK], const void *const *pages, const void *const *next, int low, int high,
                  int head_dim, float *const *out, int first, const int rows, const int width, const int bf16) {
    lanes acc[TILE_QUERIES][4];
    for (int i = 0; i < rows; i++)
        for (int l = 0; l < width; l++) acc[i][l] = v_load(out[i] + first + l * LANES);
    for (int j = low; j < high; j++) {
        lanes v[4];
        for (int l = 0; l < width; l++)
            v[l] = load_kv(pages[j / PAGE], (size_t)(j % PAGE) * head_dim + first + l * LANES, bf16);
        for (int l = 0; l < width; l++)
            fetch(next[j / PAGE], (size_t)(j % PAGE) * head_dim + first + l * LANES, bf16);
        for (int i = 0; i < rows; i++) {
            const lanes weight = v_set(weights[i][j]);
            for (int l = 0; l < width; l++) acc[i][l] = v_fma(weight, v[l], acc[i][l]);
        }
    }
    for (int i = 0; i < rows; i++)
        for (int l = 0; l < width; l++) v_store(out[i] + first + l * LANES, acc[i][l]);
}

// Turns a chunk's scores into weights, brings the largest score and the sum up to date, scales what was summed so far.
INLINE void soften(float *scores, int low, int high, float *largest, float *sum, float *out, int head_dim) {
    for (int j = 0; j < low; j++) scores[j] = -INFINITY;
    for (int j = high < 0 ? 0 : high; j < CHUNK; j++) scores[j] = -INFINITY;
    float most[LANES];
    for (int i = 0; i < LANES; i++) {
        const float a = scores[i] > scores[i + 16] ? scores[i] : scores[i + 16];
        const float b = scores[i + 32] > scores[i + 48] ? scores[i + 32] : scores[i + 48];
        most[i] = a > b ? a : b;
    }
    float top = *largest;
    for (int i = 0; i < LANES; i++) top = most[i] > top ? most[i] : top;
    const float shift = top == -INFINITY ? 0.0f : top;  // nothing seen yet: all weights are 0, and nothing is kept
    for (int j = 0; j < CHUNK; j++) scores[j] = exponential(scores[j] - shift);
    float part[LANES];
    for (int i = 0; i < LANES; i++) part[i] = (scores[i] + scores[i + 16]) + (scores[i + 32] + scores[i + 48]);
    if (top != *largest) {
        const float keep = exponential(*largest - top);
        *sum *= keep;
        for (int d = 0; d < head_dim; d++) out[d] *= keep;
        *largest = top;
    }
    *sum += fold(part);
}

#define WEIGH(rows_, width_) weigh(weights, pages, next, low, high, head_dim, out, d, rows_, width_, bf16)
#define WEIGH_ROWS(rows_)                                            \
    switch ((head_dim - d) / LANES) {                                \
        case 1: WEIGH(rows_, 1); break;                              \
        case 2: WEIGH(rows_, 2); break;                              \
        case 3: WEIGH(rows_, 3); break;                              \
        default: WEIGH(rows_, 4);                                    \
    }

INLINE void weigh_rows(float (*weights)[CHUNK], const void *const *pages, const void *const *next, int low, int high,
                       int head_dim, float *const *out, int rows, const int bf16) {
    if (low >= high) return;
    for (int d = 0; d < head_dim; d += 4 * LANES) {
        switch (rows) {
            case 1: WEIGH_ROWS(1); break;
#if TILE_QUERIES > 1
            case 2: WEIGH_ROWS(2); break;
            case 3: WEIGH_ROWS(3); break;
            case 4: WEIGH_ROWS(4); break;
#endif
        }
    }
}

// How many of a chunk's keys a row at this position sees.
INLINE int seen(int position, int start) {
    const int keys = position + 1 - start;
    return keys < 0 ? 0 : keys < CHUNK ? keys : CHUNK;
}

INLINE void attend_kind(const struct pages *p, const struct queries *q, const int bf16) {
    float scores[MAX_QUERIES][CHUNK], sums[MAX_QUERIES], largest[MAX_QUERIES];
    int last = 0, first = INT32_MAX;
    for (int i = 0; i < q->count; i++) {
        sums[i] = 0, largest[i] = -INFINITY;
        memset(q->out[i], 0, p->head_dim * sizeof(float));
        const int low = q->window ? q->position[i] - q->window + 1 : 0;
        last = q->position[i] > last ? q->position[i] : last;
        first = low < first ? low : first;
    }
    for (int start = first < 0 ? 0 : first / CHUNK * CHUNK; start <= last; start += CHUNK) {
        const void *keys[CHUNK_PAGES], *values[CHUNK_PAGES], *next_keys[CHUNK_PAGES], *next_values[CHUNK_PAGES];
        for (int i = 0; i < CHUNK_PAGES; i++) {
            const int page = start / PAGE + i, limit = last / PAGE + 1;
            keys[i] = page_at(p, page, limit, 0), values[i] = page_at(p, page, limit, 1);
            next_keys[i] = page_at(p, page + CHUNK_PAGES, limit, 0), next_values[i] = page_at(p, page + CHUNK_PAGES, limit, 1);
        }
        for (int i = 0; i < q->count; i += TILE_QUERIES) {
            const int rows = q->count - i < TILE_QUERIES ? q->count - i : TILE_QUERIES;
            switch (rows) {
                case 1: score(q->q + i, keys, next_keys, p->head_dim, q->scale, scores + i, 1, bf16); break;
#if TILE_QUERIES > 1
                case 2: score(q->q + i, keys, next_keys, p->head_dim, q->scale, scores + i, 2, bf16); break;
                case 3: score(q->q + i, keys, next_keys, p->head_dim, q->scale, scores + i, 3, bf16); break;
                case 4: score(q->q + i, keys, next_keys, p->head_dim, q->scale, scores + i, 4, bf16); break;
#endif
            }
            for (int r = i; r < i + rows; r++) {
                const int low = q->window ? q->position[r] - q->window + 1 - start : 0;
                soften(scores[r], low < CHUNK ? low : CHUNK, q->position[r] + 1 - start, largest + r, sums + r, q->out[r],
                       p->head_dim);
            }
            // What a row does not see is not even multiplied by 0: it may be NaN.
            int common = CHUNK;
            for (int r = i; r < i + rows; r++) common = seen(q->position[r], start) < common ? seen(q->position[r], start) : common;
            weigh_rows(scores + i, values, next_values, 0, common, p->head_dim, q->out + i, rows, bf16);
            for (int r = i; r < i + rows; r++)
                weigh_rows(scores + r, values, next_values, common, seen(q->position[r], start), p->head_dim, q->out + r, 1, bf16);
        }
    }
    for (int i = 0; i < q->count; i++)
        for (int d = 0; d < p->head_dim; d++) q->out[i][d] /= sums[i];
}

// out_i = softmax(scale q_i . K) V over the keys at positions up to the row's own, the last `window` of them.
static void attend(const struct pages *pages, const struct queries *queries) {
    if (pages->bf16) attend_kind(pages, queries, 1);
    else attend_kind(pages, queries, 0);
}
