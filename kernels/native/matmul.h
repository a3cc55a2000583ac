// y = x W^T, W laid out once in panels of 64 outputs: for each panel, inner index by inner index, its 64 weights.
//
// An output is one chain of fused multiply-adds over the inner index, whatever rows and columns are computed beside it:
// the same bits at every number of rows. Weights are fp32, bf16 or int8 with a scale an output; sums are fp32.
#pragma once
#include "vectors.h"

#define PANEL 64
#define PANEL_LANES (PANEL / LANES)

// Rows whose accumulators fit the registers beside a panel's weights, or beside half a panel's, or (AVX2) a quarter's.
#if defined(__AVX512F__)
#define TILE_LANES 4
#define TILE_ROWS 6
#define NARROW_ROWS 12
#else
#define TILE_LANES 2
#define TILE_ROWS 3
#define NARROW_ROWS 3
#endif

enum weight_kind { WEIGHT_FP32, WEIGHT_BF16, WEIGHT_INT8 };
enum epilogue { STORE, ADD, SWIGLU };

struct linear {
    const void *packed;
    const float *scale;  // of each output: int8 only
    const float *bias;   // of each output, or NULL
    int32_t kind, outputs, inputs;
};

INLINE size_t weight_size(int kind) { return kind == WEIGHT_FP32 ? 4 : kind == WEIGHT_BF16 ? 2 : 1; }

INLINE lanes load_weights(const void *packed, size_t index, int kind) {
    if (kind == WEIGHT_FP32) return v_load((const float *)packed + index);
    if (kind == WEIGHT_BF16) return v_load_bf16((const uint16_t *)packed + index);
    return v_load_int8((const int8_t *)packed + index);
}

// Outputs are computed 32 or 64 at a time; the last panel of a weight is padded with zeros to one of these.
INLINE int panel_width(int outputs, int panel) { return outputs - panel * PANEL > PANEL / 2 ? PANEL : PANEL / 2; }

// sums[r][c] = sum over k of x[r][k] w[k][first + c], for `rows` rows and `width` registers of columns.
INLINE void multiply(const void *panel, int kind, int stride, int first, int inputs, const float *const *x,
                     float (*sums)[PANEL], const int rows, const int width) {
    const size_t ahead = 12288 / weight_size(kind);  // far enough for the last-level cache, by trial
    lanes acc[NARROW_ROWS][TILE_LANES];
    for (int r = 0; r < rows; r++)
        for (int l = 0; l < width; l++) acc[r][l] = v_zero();
    for (int k = 0; k < inputs; k++) {
        const size_t at = (size_t)k * stride + first;
        const char *next = (const char *)panel + (at + ahead) * weight_size(kind);
        for (size_t line = 0; line < width * LANES * weight_size(kind); line += 64) _mm_prefetch(next + line, _MM_HINT_T0);
        lanes w[TILE_LANES];
        for (int l = 0; l < width; l++) w[l] = load_weights(panel, at + l * LANES, kind);
        for (int r = 0; r < rows; r++) {
            const lanes value = v_set(x[r][k]);
            for (int l = 0; l < width; l++) acc[r][l] = v_fma(value, w[l], acc[r][l]);
        }
    }
    for (int r = 0; r < rows; r++)
        for (int l = 0; l < width; l++) v_store(sums[r] + first + l * LANES, acc[r][l]);
}

// What becomes of a row's sums of one panel. SWIGLU: gate and up stand in turn, 16 of each; out = silu(gate) * up.
INLINE void finish_columns(const struct linear *linear, int first, float *restrict sums, float *restrict y, int epilogue,
                           const int columns) {
    if (linear->kind == WEIGHT_INT8)
        for (int i = 0; i < columns; i++) sums[i] *= linear->scale[first + i];
    if (linear->bias)
        for (int i = 0; i < columns; i++) sums[i] += linear->bias[first + i];
    if (epilogue == STORE) {
        for (int i = 0; i < columns; i++) y[first + i] = sums[i];
    } else if (epilogue == ADD) {
        for (int i = 0; i < columns; i++) y[first + i] += sums[i];
    } else {
        for (int pair = 0; pair < columns; pair += 2 * LANES) {
            const float *gate = sums + pair, *up = gate + LANES;
            for (int i = 0; i < LANES; i++)
                y[(first + pair) / 2 + i] = gate[i] / (1.0f + exponential(-gate[i])) * up[i];
        }
    }
}

static void finish(const struct linear *linear, int panel, float *sums, float *y, int epilogue) {
    const int first = panel * PANEL, columns = linear->outputs - first;
    if (columns >= PANEL) finish_columns(linear, first, sums, y, epilogue, PANEL);
    else finish_columns(linear, first, sums, y, epilogue, columns);
}

#define MULTIPLY(rows_, width_) \
    case rows_: multiply(weights, kind, stride, lane * LANES, linear->inputs, x, sums, rows_, width_); break;
#define MULTIPLY_FEW(width_) MULTIPLY(1, width_) MULTIPLY(2, width_) MULTIPLY(3, width_)
#define MULTIPLY_MORE(width_) MULTIPLY(4, width_) MULTIPLY(5, width_) MULTIPLY(6, width_)
#define MULTIPLY_MANY(width_) \
    MULTIPLY(7, width_) MULTIPLY(8, width_) MULTIPLY(9, width_) MULTIPLY(10, width_) MULTIPLY(11, width_) MULTIPLY(12, width_)

// Up to six rows take a whole panel at a time. More go in tiles of up to twelve, half a panel at a time, so that the
// weights come from memory less often.
INLINE void panel_of_kind(const struct linear *linear, int panel, const float *const *x, float *const *y, int count,
                          int epilogue, const int kind) {
    const int stride = panel_width(linear->outputs, panel);
    const int most = count > TILE_ROWS ? NARROW_ROWS : TILE_ROWS, tiles = (count + most - 1) / most;
    const char *weights = (const char *)linear->packed + (size_t)panel * PANEL * linear->inputs * weight_size(kind);
    for (int t = 0, rows; t < tiles; t++, x += rows, y += rows, count -= rows) {
        float sums[NARROW_ROWS][PANEL];
        rows = (count + tiles - t - 1) / (tiles - t);
#if TILE_LANES == 4
        if (stride == PANEL && rows <= TILE_ROWS) {
            const int lane = 0;
            switch (rows) { MULTIPLY_FEW(4) MULTIPLY_MORE(4) }
        } else
#endif
        for (int lane = 0; lane < stride / LANES; lane += 2) {
#if TILE_LANES == 4
            switch (rows) { MULTIPLY_FEW(2) MULTIPLY_MORE(2) MULTIPLY_MANY(2) }
#else
            switch (rows) { MULTIPLY_FEW(2) }
#endif
        }
        for (int r = 0; r < rows; r++) finish(linear, panel, sums[r], y[r], epilogue);
    }
}

// One panel of outputs for all rows: x[r] (inputs), y[r] (outputs, or half as many for SWIGLU).
static void matmul_panel(const struct linear *linear, int panel, const float *const *x, float *const *y, int count,
                         int epilogue) {
    switch (linear->kind) {
        case WEIGHT_FP32: panel_of_kind(linear, panel, x, y, count, epilogue, WEIGHT_FP32); break;
        case WEIGHT_BF16: panel_of_kind(linear, panel, x, y, count, epilogue, WEIGHT_BF16); break;
        default: panel_of_kind(linear, panel, x, y, count, epilogue, WEIGHT_INT8);
    }
}

INLINE int panels(const struct linear *linear) { return (linear->outputs + PANEL - 1) / PANEL; }
