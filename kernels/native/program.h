// A model's forward pass as a list of operations, run for the rows of one step by a team of threads.
//
// The list says nothing of model families: services/engine/native.py writes it. Buffers hold one fp32 row a token.
#pragma once
#include "attention.h"
#include "elementwise.h"
#include "matmul.h"
#include "threads.h"

enum op_kind { EMBED, NORM, LINEAR, ROTATE, ATTEND, TAKE, ROUTE, EXPERTS_UP, EXPERTS_DOWN, COMBINE };
enum rows_of { ALL_ROWS, WANTED_ROWS };

struct op {
    int32_t kind, layer, in, out, epilogue, rows_of;
    struct linear linear;           // LINEAR; EMBED: (vocabulary, hidden) row by row in `packed`
    const struct linear *experts;   // EXPERTS_UP, EXPERTS_DOWN
    const float *weight;            // NORM, TAKE; ROTATE: the queries' norm or NULL
    const float *key_weight;        // ROTATE: the keys' norm or NULL
    int32_t expert_count, per_token, normalised, size;
};

struct shape {
    int32_t heads, kv_heads, head_dim, window, kv_bf16, buffers, ops, per_token, expert_count;
    float eps, scale;
    int64_t page_stride, layer_stride, half_stride, head_stride;  // elements of the pool
};

struct buffer {
    float *data;
    int64_t stride;
};

// New tokens of several sequences, one span each; see services/engine/step.py.
struct step {
    int32_t rows, wanted, spans, table_stride;
    const int32_t *token_ids;   // (rows)
    const int32_t *parents;     // (rows) of nodes in their span, -1 above the first; NULL: every span a chain
    const int32_t *is_tree;     // (spans), or NULL with `parents`
    const int32_t *span_first;  // (spans + 1) rows
    const int32_t *span_base;   // (spans) tokens in the cache before
    const int32_t *span_table;  // (spans) row of `tables`
    const int32_t *tables;      // (.., table_stride) pages
    const int32_t *wanted_rows; // (wanted)
    const float *cos, *sin;     // (positions, head_dim / 2)
    void *pool;
    struct buffer *buffers;
    int32_t *bad_layer;         // NULL, or where to write the first layer after which a row is not finite, -1 if none
};

struct attention_unit { int32_t span, first, rows; };

struct program {
    struct shape shape;
    struct op *ops;
    struct team *team;
    int *stage_units;  // of each operation, in this step
    int32_t row_capacity;
    int32_t *positions;             // (rows)
    int64_t *slots;                 // (rows) page * 16 + place
    struct attention_unit *units;
    int32_t unit_count, group_rows;
    int32_t *chosen, *members, *offsets;  // experts: (rows * per_token) ids; the same by expert; (experts + 1)
    float *shares;                        // (rows * per_token)
    const struct step *step;
    int32_t first_op;  // of the run
};

#define ROW_BLOCK 8
#define MATMUL_BLOCK 96

INLINE float *row_of(const struct step *step, int buffer, int64_t row) {
    return step->buffers[buffer].data + row * step->buffers[buffer].stride;
}

INLINE int rows_of(const struct op *op, const struct step *step) {
    return op->rows_of == WANTED_ROWS ? step->wanted : step->rows;
}

INLINE int blocks(int rows) { return (rows + ROW_BLOCK - 1) / ROW_BLOCK; }

static int unit_count(const struct program *program, const struct op *op) {
    const struct step *step = program->step;
    switch (op->kind) {
        case LINEAR: return rows_of(op, step) ? panels(&op->linear) : 0;
        case ATTEND: return program->unit_count * program->shape.kv_heads;
        case ROUTE: return 1;
        case EXPERTS_UP: case EXPERTS_DOWN: return op->expert_count * panels(&op->experts[0]);
        default: return blocks(rows_of(op, step));
    }
}

static void run_linear(const struct step *step, const struct op *op, int panel) {
    const float *x[MATMUL_BLOCK];
    float *y[MATMUL_BLOCK];
    for (int first = 0, rows = rows_of(op, step); first < rows; first += MATMUL_BLOCK) {
        const int count = rows - first < MATMUL_BLOCK ? rows - first : MATMUL_BLOCK;
        for (int r = 0; r < count; r++) x[r] = row_of(step, op->in, first + r), y[r] = row_of(step, op->out, first + r);
        matmul_panel(&op->linear, panel, x, y, count, op->epilogue);
    }
}

// Rows that chose one expert; a row's results for its choices stand at row * per_token + rank.
static void run_expert(const struct program *program, const struct op *op, int unit) {
    const struct step *step = program->step;
    const int expert = unit / panels(&op->experts[0]), panel = unit % panels(&op->experts[0]);
    const float *x[MATMUL_BLOCK];
    float *y[MATMUL_BLOCK];
    for (int first = program->offsets[expert]; first < program->offsets[expert + 1]; first += MATMUL_BLOCK) {
        const int left = program->offsets[expert + 1] - first, count = left < MATMUL_BLOCK ? left : MATMUL_BLOCK;
        for (int r = 0; r < count; r++) {
            const int member = program->members[first + r];
            x[r] = row_of(step, op->in, op->kind == EXPERTS_UP ? member / op->per_token : member);
            y[r] = row_of(step, op->out, member);
        }
        matmul_panel(&op->experts[expert], panel, x, y, count, op->epilogue);
    }
}

// Softmax over all experts, the largest `per_token` of them (ties to the lower id), their shares.
static void route_row(const struct op *op, float *logits, int32_t *chosen, float *shares) {
    const int experts = op->expert_count;
    float most = logits[0], sum = 0, kept = 0;
    for (int e = 1; e < experts; e++) most = logits[e] > most ? logits[e] : most;
    for (int e = 0; e < experts; e++) sum += logits[e] = exponential(logits[e] - most);
    for (int rank = 0; rank < op->per_token; rank++) {
        int best = -1;
        for (int e = 0; e < experts; e++) {
            int taken = 0;
            for (int i = 0; i < rank; i++) taken |= chosen[i] == e;
            if (!taken && (best < 0 || logits[e] > logits[best])) best = e;
        }
        chosen[rank] = best;
        kept += shares[rank] = logits[best] / sum;
    }
    for (int rank = 0; rank < op->per_token && op->normalised; rank++) shares[rank] /= kept;
}

static void run_route(const struct program *program, const struct op *op) {
    const struct step *step = program->step;
    const int choices = step->rows * op->per_token;
    memset(program->offsets, 0, (op->expert_count + 1) * sizeof(int32_t));
    for (int r = 0; r < step->rows; r++)
        route_row(op, row_of(step, op->in, r), program->chosen + r * op->per_token, program->shares + r * op->per_token);
    for (int i = 0; i < choices; i++) program->offsets[program->chosen[i] + 1]++;
    for (int e = 0; e < op->expert_count; e++) program->offsets[e + 1] += program->offsets[e];
    for (int e = 0, at = 0; e < op->expert_count; e++)
        for (int i = 0; i < choices; i++)
            if (program->chosen[i] == e) program->members[at++] = i;
}

static void run_combine(const struct program *program, const struct op *op, int row) {
    float *y = row_of(program->step, op->out, row);
    for (int i = 0; i < op->size; i++) {
        float sum = 0;
        for (int rank = 0; rank < op->per_token; rank++) {
            const int member = row * op->per_token + rank;
            sum = fused(program->shares[member], row_of(program->step, op->in, member)[i], sum);
        }
        y[i] += sum;
    }
}

INLINE char *page_part(const struct program *program, int64_t page, int layer, int half, int head) {
    const struct shape *s = &program->shape;
    const int64_t at = page * s->page_stride + layer * s->layer_stride + half * s->half_stride + head * s->head_stride;
    return (char *)program->step->pool + at * (s->kv_bf16 ? 2 : 4);
}

static void run_rotate(const struct program *program, const struct op *op, int row) {
    const struct shape *s = &program->shape;
    const struct step *step = program->step;
    const int half = s->head_dim / 2, position = program->positions[row];
    const float *cos = step->cos + (int64_t)position * half, *sin = step->sin + (int64_t)position * half;
    float *head = row_of(step, op->in, row);
    for (int h = 0; h < s->heads + s->kv_heads; h++) {
        const float *weight = h < s->heads ? op->weight : op->key_weight;
        if (weight) rms_norm(head + h * s->head_dim, weight, head + h * s->head_dim, s->head_dim, s->eps);
        rotate(head + h * s->head_dim, cos, sin, half);
    }
    const int64_t page = program->slots[row] / PAGE;
    if (!page) return;  // another rank has it
    for (int h = 0; h < s->kv_heads; h++) {
        const float *k = head + (s->heads + h) * s->head_dim, *v = k + s->kv_heads * s->head_dim;
        store_kv(page_part(program, page, op->layer, 0, h), page_part(program, page, op->layer, 1, h),
                 program->slots[row] % PAGE, k, v, s->head_dim, s->kv_bf16);
    }
}

// The pages of a tree's row from the first that holds a node, its path's keys at their positions.
static void gather_tail(const struct program *program, const struct op *op, int span, int row, int head, char *tails) {
    const struct shape *s = &program->shape;
    const struct step *step = program->step;
    const int base = step->span_base[span], first = step->span_first[span], tail = base / PAGE;
    const size_t size = s->kv_bf16 ? 2 : 4, half = (size_t)PAGE * s->head_dim * size;
    const int32_t *table = step->tables + (int64_t)step->span_table[span] * step->table_stride;
    const int pages = program->positions[row] / PAGE - tail + 1;
    if (base % PAGE) {
        memcpy(tails, page_part(program, table[tail], op->layer, 0, head), half);
        memcpy(tails + half, page_part(program, table[tail], op->layer, 1, head), half);
    } else {
        memset(tails, 0, 2 * half);
    }
    memset(tails + 2 * half, 0, (pages - 1) * 2 * half);
    for (int node = row - first; node >= 0; node = step->parents[first + node]) {
        const int64_t slot = program->slots[first + node];
        const char *k = page_part(program, slot / PAGE, op->layer, 0, head);
        const char *v = page_part(program, slot / PAGE, op->layer, 1, head);
        const int position = program->positions[first + node], to = position % PAGE, from = slot % PAGE;
        char *page = tails + (size_t)(position / PAGE - tail) * 2 * half;
        for (int d = 0; d < s->head_dim; d++)
            memcpy(page + ((size_t)d * PAGE + to) * size, k + ((size_t)d * PAGE + from) * size, size);
        memcpy(page + half + to * s->head_dim * size, v + from * s->head_dim * size, s->head_dim * size);
    }
}

static void run_attend(const struct program *program, const struct op *op, int unit) {
    const struct shape *s = &program->shape;
    const struct step *step = program->step;
    const struct attention_unit *tile = &program->units[unit / s->kv_heads];
    const int head = unit % s->kv_heads, group = s->heads / s->kv_heads;
    struct pages pages = {
        .keys = page_part(program, 0, op->layer, 0, head),
        .values = page_part(program, 0, op->layer, 1, head),
        .table = step->tables + (int64_t)step->span_table[tile->span] * step->table_stride,
        .page_stride = s->page_stride, .tail = INT32_MAX, .head_dim = s->head_dim, .bf16 = s->kv_bf16,
    };
    char *tails = NULL;
    if (step->is_tree && step->is_tree[tile->span]) {
        pages.tail = step->span_base[tile->span] / PAGE;
        const int count = program->positions[tile->first] / PAGE - pages.tail + 1;
        tails = aligned_alloc(64, ((size_t)count * 2 * PAGE * s->head_dim * 4 + 63) / 64 * 64);
        if (!tails) abort();
        gather_tail(program, op, tile->span, tile->first, head, tails);
        pages.tails = tails;
    }
    struct queries queries = {.window = s->window, .scale = s->scale, .end = INT32_MAX};
    for (int first = 0; first < group; first += MAX_QUERIES) {
        queries.count = 0;
        const int heads = group - first < MAX_QUERIES ? group - first : MAX_QUERIES;
        for (int r = tile->first; r < tile->first + tile->rows; r++)
            for (int h = 0; h < heads; h++) {
                const int at = (head * group + first + h) * s->head_dim;
                queries.q[queries.count] = row_of(step, op->in, r) + at;
                queries.out[queries.count] = row_of(step, op->out, r) + at;
                queries.position[queries.count++] = program->positions[r];
            }
        attend(&pages, &queries);
        for (int i = 0; i < queries.count; i++) normalise(queries.out[i], queries.weight[i].sum, s->head_dim);
    }
    free(tails);
}

static void run_rows(const struct program *program, const struct op *op, int block) {
    const struct step *step = program->step;
    const int rows = rows_of(op, step), end = (block + 1) * ROW_BLOCK < rows ? (block + 1) * ROW_BLOCK : rows;
    for (int row = block * ROW_BLOCK; row < end; row++) {
        float *out = row_of(step, op->out, row);
        switch (op->kind) {
            case EMBED: {
                const size_t at = (size_t)step->token_ids[row] * op->size;
                for (int i = 0; i < op->size; i++)
                    out[i] = op->linear.kind == WEIGHT_BF16 ? from_bf16(((const uint16_t *)op->linear.packed)[at + i])
                                                            : ((const float *)op->linear.packed)[at + i];
                break;
            }
            case NORM: rms_norm(row_of(step, op->in, row), op->weight, out, op->size, program->shape.eps); break;
            case TAKE:
                rms_norm(row_of(step, op->in, step->wanted_rows[row]), op->weight, out, op->size, program->shape.eps);
                break;
            case ROTATE: run_rotate(program, op, row); break;
            default: run_combine(program, op, row);
        }
    }
}

static void run_unit(const struct program *program, const struct op *op, int unit) {
    switch (op->kind) {
        case LINEAR: run_linear(program->step, op, unit); break;
        case ATTEND: run_attend(program, op, unit); break;
        case ROUTE: run_route(program, op); break;
        case EXPERTS_UP: case EXPERTS_DOWN: run_expert(program, op, unit); break;
        default: run_rows(program, op, unit);
    }
}

static void watch(const struct program *program, int index) {
    const struct op *op = &program->ops[index];
    const int last = index + 1 == program->shape.ops || program->ops[index + 1].layer != op->layer;
    if (!last || op->kind == EMBED || *program->step->bad_layer >= 0) return;
    for (int row = 0; row < rows_of(op, program->step); row++) {
        const float *x = row_of(program->step, op->out, row);
        const int size = op->kind == LINEAR ? op->linear.outputs : op->size;
        for (int i = 0; i < size; i++)
            if (!isfinite(x[i])) *program->step->bad_layer = op->layer;
    }
}

static void run_stage_unit(void *argument, int index, int unit) {
    const struct program *program = argument;
    run_unit(program, &program->ops[program->first_op + index], unit);
}

static int grow(struct program *program, int rows) {
    if (rows <= program->row_capacity && program->units) return 1;
    const int capacity = rows + rows / 2, choices = capacity * (program->shape.per_token + 1);
#define GROW(field, count)                                                                     \
    do {                                                                                       \
        void *bigger = realloc(program->field, (size_t)(count) * sizeof *program->field);      \
        if (!bigger) return 0;                                                                 \
        program->field = bigger;                                                               \
    } while (0)
    GROW(positions, capacity);
    GROW(slots, capacity);
    GROW(units, capacity);
    GROW(chosen, choices);
    GROW(members, choices);
    GROW(shares, choices);
    program->row_capacity = capacity;
    return 1;
}

// Positions, places in the cache, and attention's units: chains in tiles of some rows, a tree row by row.
static void lay_out(struct program *program, const struct step *step) {
    program->unit_count = 0;
    for (int s = 0; s < step->spans; s++) {
        const int first = step->span_first[s], end = step->span_first[s + 1], base = step->span_base[s];
        const int tree = step->is_tree && step->is_tree[s];
        const int32_t *table = step->tables + (int64_t)step->span_table[s] * step->table_stride;
        for (int row = first; row < end; row++) {
            const int slot = base + row - first, parent = tree ? step->parents[row] : row - first - 1;
            program->positions[row] = parent < 0 ? base : program->positions[first + parent] + 1;
            program->slots[row] = (int64_t)table[slot / PAGE] * PAGE + slot % PAGE;
        }
        const int tile = tree ? 1 : program->group_rows;
        for (int row = first; row < end; row += tile)
            program->units[program->unit_count++] =
                (struct attention_unit){s, row, end - row < tile ? end - row : tile};
    }
}

struct program *program_new(const struct shape *shape, const struct op *ops, struct team *team) {
    struct program *program = calloc(1, sizeof *program);
    if (!program) return NULL;
    program->shape = *shape, program->team = team;
    program->ops = malloc(shape->ops * sizeof *ops);
    program->stage_units = calloc(shape->ops, sizeof *program->stage_units);
    program->offsets = calloc(shape->expert_count + 1, sizeof *program->offsets);
    const int group = shape->heads / shape->kv_heads;
    program->group_rows = group >= 16 ? 1 : 16 / group;
    if (program->ops && program->stage_units && program->offsets) {
        memcpy(program->ops, ops, shape->ops * sizeof *ops);
        return program;
    }
    free(program->ops), free(program->stage_units), free(program->offsets), free(program);
    return NULL;
}

void program_free(struct program *program) {
    free(program->ops), free(program->stage_units), free(program->offsets), free(program->positions), free(program->slots);
    free(program->units), free(program->chosen), free(program->members), free(program->shares), free(program);
}

// Operations [first, last) of a step; operation 0 is run first. 0, or -1 when there is no memory (nothing was computed).
int program_run_ops(struct program *program, const struct step *step, int first, int last) {
    program->step = step, program->first_op = first;
    if (!first) {
        if (!grow(program, step->rows)) return -1;
        lay_out(program, step);
    }
    for (int i = first; i < last; i++) program->stage_units[i - first] = unit_count(program, &program->ops[i]);
    if (!step->bad_layer) return team_run(program->team, last - first, program->stage_units, run_stage_unit, program);
    for (int i = first; i < last; i++) {
        for (int unit = 0; unit < program->stage_units[i - first]; unit++) run_unit(program, &program->ops[i], unit);
        watch(program, i);
    }
    return 0;
}

int program_run(struct program *program, const struct step *step) {
    return program_run_ops(program, step, 0, program->shape.ops);
}
