// Attention of a few rows over paged keys and values, by leaves of 64 keys and the canonical tree over them.
//
// A row's result depends on its own keys only. A leaf is the keys at positions [64 i, 64 i + 64); its weights are
// relative to its largest score, a score being one chain over the head's elements, sums chains over the keys in order.
// Leaves are combined in pairs, pairs in pairs, and so on (kernels/merge.py): whoever computes some of them, the result has the
// same bits. A partial is kept as (sum of weights times values, largest score, sum of weights), not as (out, lse): that
// spares a division and a logarithm a leaf. A page holds 16 keys: K as (head_dim, 16), so that 16 scores stand side by
// side, V as (16, head_dim).
#pragma once
#include "vectors.h"

#define PAGE 16
#define LEAF 64
#define LEAF_PAGES (LEAF / PAGE)
#define MAX_LEVELS 26
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

// The largest score and the sum of the weights relative to it; no key is seen: -inf and 0.
struct weight { float top, sum; };

// Rows over the keys of the leaves [first, end): the whole tree, or one node of it.
struct queries {
    const float *q[MAX_QUERIES];  // (head_dim)
    float *out[MAX_QUERIES];      // (head_dim) weights times values
    struct weight weight[MAX_QUERIES];
    int32_t position[MAX_QUERIES];
    int32_t count, window;  // window 0: none
    int32_t first, end;
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

// scores[i][j] = scale * q_i . k_j for a leaf's 64 keys.
INLINE void score(const float *const *q, const void *const *pages, const void *const *next, int head_dim, float scale,
                  float (*scores)[LEAF], const int rows, const int bf16) {
    lanes acc[TILE_QUERIES][LEAF_PAGES];
    for (int i = 0; i < rows; i++)
        for (int p = 0; p < LEAF_PAGES; p++) acc[i][p] = v_zero();
    for (int d = 0; d < head_dim; d++) {
        lanes k[LEAF_PAGES];
        for (int p = 0; p < LEAF_PAGES; p++) k[p] = load_kv(pages[p], (size_t)d * PAGE, bf16);
        for (int p = 0; p < LEAF_PAGES; p++) fetch(next[p], (size_t)d * PAGE, bf16);
        for (int i = 0; i < rows; i++) {
            const lanes value = v_set(q[i][d]);
            for (int p = 0; p < LEAF_PAGES; p++) acc[i][p] = v_fma(value, k[p], acc[i][p]);
        }
    }
    for (int i = 0; i < rows; i++)
        for (int p = 0; p < LEAF_PAGES; p++) v_store(scores[i] + p * PAGE, v_mul(acc[i][p], v_set(scale)));
}

// out[i] += sum over the keys j from `low` up to `high` of weights[i][j] v_j, elements first ... first + 16 width.
INLINE void weigh(float (*weights)[LEAF], const void *const *pages, const void *const *next, int low, int high,
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

// Turns a leaf's scores into weights.
INLINE struct weight soften(float *scores, int low, int high) {
    for (int j = 0; j < low; j++) scores[j] = -INFINITY;
    for (int j = high < 0 ? 0 : high; j < LEAF; j++) scores[j] = -INFINITY;
    float most[LANES];
    for (int i = 0; i < LANES; i++) {
        const float a = scores[i] > scores[i + 16] ? scores[i] : scores[i + 16];
        const float b = scores[i + 32] > scores[i + 48] ? scores[i + 32] : scores[i + 48];
        most[i] = a > b ? a : b;
    }
    float largest = -INFINITY;
    for (int i = 0; i < LANES; i++) largest = most[i] > largest ? most[i] : largest;
    const float shift = largest == -INFINITY ? 0.0f : largest;  // all scores are NaN or -inf
    for (int j = 0; j < LEAF; j++) scores[j] = exponential(scores[j] - shift);
    float part[LANES];
    for (int i = 0; i < LANES; i++) part[i] = (scores[i] + scores[i + 16]) + (scores[i + 32] + scores[i + 48]);
    return (struct weight){shift, fold(part)};
}

// b = the partial of a, which comes first, and b. An empty one would leave the other's bits as they are.
static void combine(const float *a, struct weight of_a, float *b, struct weight *of_b, int head_dim) {
    const float top = of_a.top > of_b->top ? of_a.top : of_b->top;
    const float first = exponential(of_a.top - top), second = exponential(of_b->top - top);
    for (int d = 0; d < head_dim; d += LANES)
        v_store(b + d, v_fma(v_load(a + d), v_set(first), v_mul(v_load(b + d), v_set(second))));
    *of_b = (struct weight){top, fused(of_a.sum, first, of_b->sum * second)};
}

// Left siblings that wait for their right ones, at most one a level: the digits of a binary counter of leaves.
struct waiting {
    float *outs;  // (levels, head_dim)
    struct weight weights[MAX_LEVELS];
    uint32_t levels;  // a bit each
};

// One more node, given as its partial, to the right of those before. The last one leaves the root in `out` and `weight`.
INLINE void climb(struct waiting *waiting, int level, int index, int last, float *out, struct weight *weight, int head_dim) {
    for (; last ? waiting->levels >> level : index & 1; level++, index >>= 1) {
        if (!(waiting->levels >> level & 1)) continue;  // the sibling is empty
        combine(waiting->outs + (size_t)level * head_dim, waiting->weights[level], out, weight, head_dim);
        waiting->levels &= ~(1u << level);
    }
    if (last) return;
    memcpy(waiting->outs + (size_t)level * head_dim, out, head_dim * sizeof(float));
    waiting->weights[level] = *weight, waiting->levels |= 1u << level;
}

#define WEIGH(rows_, width_) weigh(weights, pages, next, low, high, head_dim, out, d, rows_, width_, bf16)
#define WEIGH_ROWS(rows_)                                            \
    switch ((head_dim - d) / LANES) {                                \
        case 1: WEIGH(rows_, 1); break;                              \
        case 2: WEIGH(rows_, 2); break;                              \
        case 3: WEIGH(rows_, 3); break;                              \
        default: WEIGH(rows_, 4);                                    \
    }

INLINE void weigh_rows(float (*weights)[LEAF], const void *const *pages, const void *const *next, int low, int high,
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
    return keys < 0 ? 0 : keys < LEAF ? keys : LEAF;
}

INLINE int levels_of(int leaves) {
    int levels = 1;
    while (leaves >> levels) levels++;
    return levels + 1;
}

INLINE void attend_kind(const struct pages *p, struct queries *q, const int bf16) {
    float scores[MAX_QUERIES][LEAF];
    struct waiting waiting[MAX_QUERIES];
    int last = -1, first = INT32_MAX;
    for (int i = 0; i < q->count; i++) {
        const int low = q->window && q->position[i] >= q->window ? q->position[i] - q->window + 1 : 0;
        last = q->position[i] > last ? q->position[i] : last;
        first = low < first ? low : first;
        waiting[i].levels = 0, q->weight[i] = (struct weight){-INFINITY, 0};
        memset(q->out[i], 0, p->head_dim * sizeof(float));
    }
    const int from = first / LEAF > q->first ? first / LEAF : q->first, to = last / LEAF < q->end ? last / LEAF + 1 : q->end;
    if (last < 0 || from >= to) return;
    const int levels = levels_of(to);
    float stack[from + 1 < to ? q->count * levels * p->head_dim : 1];
    for (int i = 0; i < q->count; i++) waiting[i].outs = stack + (from + 1 < to ? (size_t)i * levels * p->head_dim : 0);
    for (int leaf = from; leaf < to; leaf++) {
        const int start = leaf * LEAF;
        const void *keys[LEAF_PAGES], *values[LEAF_PAGES], *next_keys[LEAF_PAGES], *next_values[LEAF_PAGES];
        for (int i = 0; i < LEAF_PAGES; i++) {
            const int page = start / PAGE + i, limit = last / PAGE + 1;
            keys[i] = page_at(p, page, limit, 0), values[i] = page_at(p, page, limit, 1);
            next_keys[i] = page_at(p, page + LEAF_PAGES, limit, 0), next_values[i] = page_at(p, page + LEAF_PAGES, limit, 1);
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
            int visible[TILE_QUERIES];
            for (int r = 0; r < rows; r++) {
                const int row = i + r, low = q->window ? q->position[row] - q->window + 1 - start : 0;
                visible[r] = seen(q->position[row], start) > 0 && low < LEAF;
                if (!visible[r]) continue;
                memset(q->out[row], 0, p->head_dim * sizeof(float));
                q->weight[row] = soften(scores[row], low, q->position[row] + 1 - start);
            }
            // What a row does not see is not even multiplied by 0: it may be NaN.
            int common = LEAF;
            for (int r = 0; r < rows; r++) {
                const int keys_seen = visible[r] ? seen(q->position[i + r], start) : 0;
                common = keys_seen < common ? keys_seen : common;
            }
            weigh_rows(scores + i, values, next_values, 0, common, p->head_dim, q->out + i, rows, bf16);
            for (int r = 0; r < rows; r++) {
                const int row = i + r;
                if (!visible[r]) continue;
                weigh_rows(scores + row, values, next_values, common, seen(q->position[row], start), p->head_dim, q->out + row, 1, bf16);
                const int final = leaf + 1 == to || q->position[row] < start + LEAF;
                climb(&waiting[row], 0, leaf, final, q->out[row], &q->weight[row], p->head_dim);
            }
        }
    }
}

// softmax(scale q_i . K) V, its weights not yet normalised, over the keys of the leaves [first, end) at positions up to the
// row's own, the last `window` of them.
static void attend(const struct pages *pages, struct queries *queries) {
    if (pages->bf16) attend_kind(pages, queries, 1);
    else attend_kind(pages, queries, 0);
}

INLINE void normalise(float *out, float sum, int head_dim) {
    for (int d = 0; d < head_dim; d++) out[d] /= sum;
}
