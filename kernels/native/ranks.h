// One rank's part of a step whose keys are spread over ranks: some operations at a time, the partials of the nodes of the
// canonical tree that stand here, and the fold of partials from everywhere. services/engine/ranks/shard.py puts them together.
#pragma once
#include "program.h"

// Rows [first, first + rows) of the queries over the leaves [from, to) of one sequence; results from row `out` on.
struct node_unit { int32_t first, rows, table, from, to, out; };

struct node_work {
    const struct program *program;
    const struct step *step;
    const float *q;
    const int32_t *positions;
    const struct node_unit *units;
    float *outs;
    struct weight *weights;
    int32_t layer;
};

static void attend_node(void *argument, int stage, int unit) {
    (void)stage;
    const struct node_work *work = argument;
    const struct shape *s = &work->program->shape;
    const struct node_unit *node = &work->units[unit / s->kv_heads];
    const int head = unit % s->kv_heads, group = s->heads / s->kv_heads, width = s->heads * s->head_dim;
    const struct pages pages = {
        .keys = page_part(work->program, 0, work->layer, 0, head),
        .values = page_part(work->program, 0, work->layer, 1, head),
        .table = work->step->tables + (int64_t)node->table * work->step->table_stride,
        .page_stride = s->page_stride, .tail = INT32_MAX, .head_dim = s->head_dim, .bf16 = s->kv_bf16,
    };
    struct queries queries = {.window = s->window, .scale = s->scale, .first = node->from, .end = node->to};
    for (int first = 0; first < group; first += MAX_QUERIES) {
        const int heads = group - first < MAX_QUERIES ? group - first : MAX_QUERIES;
        queries.count = 0;
        for (int r = 0; r < node->rows; r++)
            for (int h = 0; h < heads; h++) {
                const int at = (head * group + first + h) * s->head_dim;
                queries.q[queries.count] = work->q + (int64_t)(node->first + r) * width + at;
                queries.out[queries.count] = work->outs + (int64_t)(node->out + r) * width + at;
                queries.position[queries.count++] = work->positions[node->first + r];
            }
        attend(&pages, &queries);
        for (int i = 0; i < queries.count; i++)
            work->weights[(int64_t)(node->out + i / heads) * s->heads + head * group + first + i % heads] = queries.weight[i];
    }
}

// Partials outs (.., heads head_dim), weights (.., heads) of some units, each of at most MAX_QUERIES rows times heads of a group.
void attend_nodes(struct program *program, const struct step *step, int layer, const float *q, const int32_t *positions,
                  const struct node_unit *units, int count, float *outs, struct weight *weights) {
    struct node_work work = {program, step, q, positions, units, outs, weights, layer};
    const int all = count * program->shape.kv_heads;
    program->step = step;
    team_run(program->team, 1, &all, attend_node, &work);
}

// A node of the tree and the row of its partial.
struct node_part { int32_t level, index, at; };

struct fold_work {
    const struct shape *shape;
    const struct node_part *parts;
    const int32_t *offsets;  // (rows + 1)
    const float *outs;
    const struct weight *weights;
    float *to;
    int64_t stride;
};

INLINE int seen_any(const struct fold_work *work, int part, int head) {
    return work->weights[(int64_t)work->parts[part].at * work->shape->heads + head].top != -INFINITY;
}

static void fold_row(void *argument, int stage, int row) {
    (void)stage;
    const struct fold_work *work = argument;
    const int heads = work->shape->heads, size = work->shape->head_dim;
    float stack[(MAX_LEVELS + 1) * size];
    for (int h = 0; h < heads; h++) {
        struct waiting waiting = {.outs = stack};
        struct weight weight = {-INFINITY, 0};
        float *to = work->to + row * work->stride + h * size;
        int end = work->offsets[row + 1];
        while (end > work->offsets[row] && !seen_any(work, end - 1, h)) end--;
        for (int i = work->offsets[row]; i < end; i++) {
            const struct node_part *part = &work->parts[i];
            if (!seen_any(work, i, h)) continue;
            weight = work->weights[(int64_t)part->at * heads + h];
            memcpy(to, work->outs + ((int64_t)part->at * heads + h) * size, size * sizeof(float));
            climb(&waiting, part->level, part->index, i + 1 == end, to, &weight, size);
        }
        normalise(to, weight.sum, size);
    }
}

// to[row] = the root over the row's parts, which stand in the order of their leaves. parts: (offsets[rows]).
void fold_nodes(struct program *program, const struct node_part *parts, const int32_t *offsets, int rows, const float *outs,
                const struct weight *weights, float *to, int64_t stride) {
    struct fold_work work = {&program->shape, parts, offsets, outs, weights, to, stride};
    team_run(program->team, 1, &rows, fold_row, &work);
}
