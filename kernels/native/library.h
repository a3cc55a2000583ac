// What Python calls; kernels/native/library.py mirrors the structures.
#include "program.h"
#include "ranks.h"
#include "sampling.h"

// Lays out weights (outputs, inputs), row by row, in panels. `interleaved`: rows are gate then up, wanted 16 by 16 in turn.
void pack(const void *weights, void *packed, int64_t outputs, int64_t inputs, int kind, int interleaved) {
    const size_t size = weight_size(kind);
    for (int64_t first = 0; first < outputs; first += PANEL) {
        const int64_t stride = panel_width((int)outputs, (int)(first / PANEL));
        char *panel = (char *)packed + first * inputs * size;
        for (int64_t column = 0; column < stride; column++) {
            int64_t row = first + column;
            if (interleaved) row = row / (2 * LANES) * LANES + row % LANES + (row / LANES % 2) * (outputs / 2);
            for (int64_t k = 0; k < inputs; k++) {
                char *to = panel + (k * stride + column) * size;
                if (first + column < outputs) memcpy(to, (const char *)weights + (row * inputs + k) * size, size);
                else memset(to, 0, size);
            }
        }
    }
}

struct sample_work {
    const struct sampling *samplings;
    float *logits;
    int32_t *tokens;
    float *margins;
    int64_t stride;
    int32_t size;
};

static void sample_unit(void *argument, int stage, int row) {
    (void)stage;
    struct sample_work *work = argument;
    float *margin = work->margins ? work->margins + row : NULL;
    work->tokens[row] = sample_row(&work->samplings[row], work->logits + row * work->stride, work->size, margin);
}

// `margins`: NULL, or (rows), see sample_row.
void sample(struct team *team, const struct sampling *samplings, float *logits, int64_t stride, int rows, int size,
            int32_t *tokens, float *margins) {
    struct sample_work work = {samplings, logits, tokens, margins, stride, size};
    team_run(team, 1, &rows, sample_unit, &work);
}

// Continues each span of a step token by token, each token sampled and fed to the next pass: counts[s] tokens, or fewer
// if one leads by less than `margin` and is the last then. The step wants each span's last row; slots for all tokens
// are reserved. tokens: (spans, most), produced: (spans). 0, or -1 when there is no memory.
int draft(struct program *program, const struct step *first, const struct sampling *samplings, const int32_t *counts,
          float margin, int32_t *tokens, int most, int32_t *produced) {
    const int spans = first->spans, logits = program->ops[program->shape.ops - 1].out;
    const int vocabulary = program->ops[program->shape.ops - 1].linear.outputs;
    int32_t *memory = malloc((size_t)(6 * spans + 1) * sizeof *memory + 1);
    float *margins = malloc((size_t)spans * sizeof *margins + 1);
    struct sampling *rules = malloc((size_t)spans * sizeof *rules + 1);
    int failed = !memory || !margins || !rules;
    if (!failed) {
        int32_t *ids = memory, *base = ids + spans, *table = base + spans, *rows = table + spans, *live = rows + spans,
                *starts = live + spans;
        struct step step = *first;
        for (int s = 0; s < spans; s++) {
            live[s] = s, produced[s] = 0, rules[s] = samplings[s];
            base[s] = first->span_base[s] + first->span_first[s + 1] - first->span_first[s], table[s] = first->span_table[s];
        }
        for (int alive = spans; alive && !failed;) {
            failed = program_run(program, &step);
            if (failed) break;
            sample(program->team, rules, step.buffers[logits].data, step.buffers[logits].stride, alive, vocabulary, ids,
                   margins);
            int kept = 0;
            for (int i = 0; i < alive; i++) {
                const int s = live[i], token = ids[i];
                if (token < 0) continue;
                tokens[s * most + produced[s]++] = token;
                if (produced[s] >= counts[s] || margins[i] < margin) continue;
                ids[kept] = token, live[kept] = s, rows[kept] = kept, starts[kept] = kept, rules[kept] = rules[i];
                rules[kept].position++;
                base[kept] = base[i] + (produced[s] > 1), table[kept++] = table[i];
            }
            starts[kept] = kept, alive = kept;
            step.rows = step.wanted = step.spans = kept;
            step.token_ids = ids, step.parents = NULL, step.is_tree = NULL, step.span_first = starts;
            step.span_base = base, step.span_table = table, step.wanted_rows = rows;
        }
    }
    free(memory), free(margins), free(rules);
    return failed ? -1 : 0;
}

// For tests of one operation each.
void attend_once(const struct pages *pages, struct queries *queries) { attend(pages, queries); }

void exponentials(const float *x, float *y, int64_t size) {
    for (int64_t i = 0; i < size; i++) y[i] = exponential(x[i]);
}
