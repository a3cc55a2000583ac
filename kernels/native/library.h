// What Python calls; kernels/native/library.py mirrors the structures.
#include "program.h"
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
    int64_t stride;
    int32_t size;
};

static void sample_unit(void *argument, int stage, int row) {
    (void)stage;
    struct sample_work *work = argument;
    work->tokens[row] = sample_row(&work->samplings[row], work->logits + row * work->stride, work->size);
}

void sample(struct team *team, const struct sampling *samplings, float *logits, int64_t stride, int rows, int size,
            int32_t *tokens) {
    struct sample_work work = {samplings, logits, tokens, stride, size};
    team_run(team, 1, &rows, sample_unit, &work);
}

// For tests of one operation each.
void attend_once(const struct pages *pages, const struct queries *queries) { attend(pages, queries); }

void exponentials(const float *x, float *y, int64_t size) {
    for (int64_t i = 0; i < size; i++) y[i] = exponential(x[i]);
}
