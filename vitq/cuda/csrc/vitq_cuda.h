// The C interface of vitq's CUDA library: what Python calls through ctypes (vitq/cuda/loader.py mirrors every struct).
//
// Every function launches on `stream`, allocates nothing, never waits, and returns 0, a positive cudaError_t, or a negative
// VITQ_* code when the arguments cannot run. Pointers are device pointers of the current device.
#pragma once

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define VITQ_ABI_VERSION 10  // ABI_VERSION in vitq/cuda/loader.py; raise both when a struct or function changes
#define VITQ_MAX_SEGMENTS 4

enum { VITQ_BAD_ARGUMENT = -1, VITQ_UNSUPPORTED = -2, VITQ_NO_DRIVER_SYMBOL = -3 };

typedef enum { VITQ_F32 = 0, VITQ_F16 = 1, VITQ_BF16 = 2, VITQ_S8 = 3, VITQ_S4 = 4 } VitqDtype;
typedef enum { VITQ_NO_ACTIVATION = 0, VITQ_RELU = 1, VITQ_GELU = 2, VITQ_GELU_TANH = 3, VITQ_SILU = 4 } VitqActivation;  // silu: of gates alone
typedef enum { VITQ_NO_NORM = 0, VITQ_LAYER_NORM = 1, VITQ_RMS_NORM = 2 } VitqNorm;

// A matrix of rows that may lie in groups: row r is at data + (r / rows_per_group) * group_stride
// + (r % rows_per_group) * row_stride, in elements. Columns are contiguous.
typedef struct {
  void* data;
  int64_t row_stride, group_stride;
  int32_t dtype;
} VitqMatrix;

// y = act(Σ_s r·acc_s·scale_s[n] + row_shift·column_sums[n] + fp[m, n] + bias[n]) + residual, cast or requantized.
// acc_s is the exact int32 of segment s; r the row's scale, or 1.
typedef struct {
  const void* a;         // int8 [m, >= a_columns] codes, rows 16-byte aligned; a_bits = 4: two codes a byte
  int64_t lda;           // bytes between rows, a multiple of 16
  const void* weight;    // layout.py: [n_pad, k] int8, or [n_pad, k / 2] packed int4; rows permuted in groups of 32
  int32_t m, n, k;       // n columns of the result; k a multiple of 32 (64 with 4-bit weights), n_pad the next multiple of 32 of n
  int32_t a_columns;     // columns that a has; the rest of k meets zero weights and is read as zero
  int32_t a_bits, weight_bits;  // 8 or 4
  int32_t segments;      // 1 .. VITQ_MAX_SEGMENTS
  int32_t segment_ends[VITQ_MAX_SEGMENTS];  // in k, multiples of 32, the last one k
  const float* scale;    // [segments, n_pad]
  const float* column_sums;  // [n_pad], sums of the weight's columns; or null
  const float* row_shift;   // [m], what is added to all numbers of a row of a; given with column_sums
  const float* bias;     // [n_pad]
  const float* row_scale;   // [m] or null
  const void* a_fp;      // fp16 [m, k_fp], or null
  int64_t lda_fp;        // elements, a multiple of 8
  const void* weight_fp; // fp16 [n_pad, k_fp], rows permuted as weight's; k_fp a multiple of 16
  int32_t k_fp;
  int32_t rows_per_group;   // of residual and out
  VitqMatrix residual;   // data null: none
  VitqMatrix out;        // VITQ_S8: codes
  int32_t activation;
  // Codes out: without an activation scale and bias already hold 1 / out_scale and the zero point, so
  // code = clamp(rint(y)); with one, code = clamp(rint(act(y) * out_inverse + out_zero)).
  float out_inverse, out_zero;
  int32_t qmin, qmax;
  // Two levels of scales, of 4-bit weights in vitq_linear_few, and in vitq_linear_sm90 with groups of a multiple of 128: (code - group_zero)·multiplier of the row and its group of group_columns
  // neighbouring columns, a multiple of 32, is multiplied in place of the code, and must be an int8. A row of n_pad for each group of the
  // a_columns, in the order of layout.py's even_first; group_zero may be null. multiplier null: none.
  const int8_t *multiplier, *group_zero;
  int32_t group_columns;
  int32_t config;        // tile configuration, an index of the kernel's own table
} VitqLinear;

#define VITQ_FEW_ROWS 16
#define VITQ_PACKED_GROUP 128  // columns: vitq_linear_sm90 reads groups of multiples of it
int vitq_linear_sm90(const VitqLinear* args, void* stream);  // wgmma and TMA: 8-bit inputs; 4-bit weights in one segment
int vitq_linear_sm80(const VitqLinear* args, void* stream);  // mma.sync: all but multipliers
int vitq_linear_few(const VitqLinear* args, void* stream);   // mma.sync, bound by reading the weight: up to VITQ_FEW_ROWS rows, one segment, no zero
int vitq_linear_sm90_configs(void);  // how many configurations there are
int vitq_linear_sm80_configs(void);
int vitq_linear_few_configs(void);   // of vitq_weight_only too; both choose themselves where config is -1

// y = Σ_k x·(code - zero)·scale + bias, the sums in float32. Scales and zero points are those of the row and of the column's group of
// group_columns neighbours: a row of n_pad for each group of the x_columns, in the order of layout.py's even_first.
typedef struct {
  const void* x;         // fp16 or bf16 [m, x_columns], rows 16-byte aligned; the rest of k is read as zero
  int64_t ldx;           // elements
  int32_t x_dtype, x_columns;
  const void* weight;    // layout.py, as in VitqLinear, but of each four bytes of 4-bit codes the middle two exchanged
  int32_t m, n, k, weight_bits;
  const float* scale;
  const int8_t* zero;    // within the codes' range; or null
  int64_t scale_stride;  // elements between groups, of zero too
  int32_t group_columns; // a multiple of 32
  const float* bias;     // [n_pad] or null
  void* out;             // [m, n]
  int64_t out_stride;    // elements
  int32_t out_dtype;     // a float type
  int32_t config;
} VitqWeightOnly;

int vitq_weight_only(const VitqWeightOnly* args, void* stream);  // m up to VITQ_FEW_ROWS
// The weight alone, rounded once from float32: out [n, x_columns], rows in logical order, out_stride apart. x, x_dtype, m, bias are not read.
int vitq_dequantize(const VitqWeightOnly* args, void* stream);

// softmax((q − q_zero)·kᵀ·logit_scale + bias + mask)·(v − v_zero)·v_scale on codes, probabilities requantized row by row.
#define VITQ_MOST_HEADS 64       // that may have scales of their own
typedef struct {
  const int8_t *q, *k, *v;       // element (b, token, head, d) at b*strides[0] + token*strides[1] + head*strides[2] + d
  int64_t q_strides[3], k_strides[3], v_strides[3];
  int32_t batch, heads, queries, keys, dim;
  // On the host, `scales` of each: 1, or one a head.
  const float* logit_scale;      // q scale · k scale · softmax scale
  const float* v_scale;
  const int32_t *q_zero, *v_zero;  // k's zero point cancels in the softmax
  int32_t scales;
  int32_t p_bits;
  const float* bias;             // [heads or 1, queries, keys], strides in elements, columns contiguous; or null
  int64_t bias_head, bias_row;
  const float* mask;             // [mask_windows, queries, keys]; batch b uses b % mask_windows; or null
  int64_t mask_window, mask_row;
  int32_t mask_windows;
  // Windows of images (Swin): window_h > 0. Then batch counts images of height x width tokens in row order, queries = keys =
  // window_h·window_w, the image is shifted cyclically by (shift_h, shift_w) before it is cut, padded at its lower right
  // edge to whole windows, and tokens that the shift brought together from apart see each other with −100.
  int32_t height, width, window_h, window_w, shift_h, shift_w;
  const int8_t* pad;             // [3, heads, dim] codes of q, k, v where the image is padded; null if it never is
  void* out;                     // [batch, tokens, heads·dim] contiguous
  int32_t out_dtype;             // VITQ_S8: codes, else float
  float out_scale;               // code = clamp(rint(y / out_scale) + out_zero)
  int32_t out_zero, qmin, qmax;
} VitqAttention;

int vitq_attention(const VitqAttention* args, void* stream);
// 0 if the kernel takes this shape, else VITQ_UNSUPPORTED
int vitq_attention_supports(int32_t queries, int32_t keys, int32_t dim, int32_t windows);

// Rows of floats to codes, in one pass: (x + residual) -> norm -> columns -> codes.
typedef struct {
  VitqMatrix x;
  int32_t rows_per_group;
  int32_t m, columns;            // m rows of `columns` features
  // Patch merging (Swin): merge_width > 0. Then x is [.., merge_height, merge_width, columns / 4], contiguous, a row of the
  // result the 2 x 2 neighbours side by side in the order (0,0), (1,0), (0,1), (1,1), and m counts the merged rows.
  int32_t merge_height, merge_width;
  VitqMatrix residual;           // added to x; data null: none
  VitqMatrix sum;                // where x + residual goes, in its own dtype; data null: nowhere
  int32_t norm;                  // VitqNorm
  const float *weight, *bias;    // [columns] or null
  float eps;
  const int32_t* order;          // [out_columns] which feature each code column holds, -1: zero; or null: in order
  int32_t out_columns;
  const uint8_t* counted;        // [(columns + 7) / 8], a bit for each feature in `order`: given with it and row_scale
  const int32_t* starts;         // [columns / 8], or null; where order and fp_order share all features and both ascend: how many of order
                                 // come before each eighth feature
  void* out;                     // int8 [m, out_stride]; VITQ_S4: packed, low nibble first; or float: the norm's result
  int64_t out_stride;            // bytes for codes, elements for floats
  int32_t out_dtype;
  float scale;                   // static: code = clamp(rint(y / scale) + zero); unused if row_scale is given
  int32_t zero, qmin, qmax;
  float* row_scale;              // [m]: dynamic, scale = max(amax, 1e-12) / qmax of the columns in `order`
  // [m], or null: dynamic and asymmetric, of the least and the largest of these columns. Then scale = max(hi - lo, 1e-12) /
  // (qmax - qmin), code = clamp(rint((y - lo) / scale) + qmin), and a number is code · scale + shift.
  float* row_shift;
  const int32_t* fp_order;       // [fp_columns] features that stay in float
  int32_t fp_columns;
  void* fp_out;                  // fp16 [m, fp_columns] or null
} VitqRows;

int vitq_rows(const VitqRows* args, void* stream);

// Images float [batch, channels, height, width], contiguous, to codes of patches: int8 [batch · (height/ph) · (width/pw),
// channels·ph·pw], features in the order of a convolution's weight. What is left over at the lower right is cut off.
typedef struct {
  const void* images;
  int32_t dtype, batch, channels, height, width, patch_h, patch_w;
  float scale;
  int32_t zero, qmin, qmax;
  int8_t* out;
  int64_t out_stride;            // bytes
} VitqPatches;

int vitq_patches(const VitqPatches* args, void* stream);

// Packed int4 weight (layout.py) to int8 [rows, k] in the same row order. With multiplier int8 [groups, rows] (even_first) and group uint8 [k]:
// each code, less the zero point int8 [groups, rows] if that is given too, times the multiplier that its row has for its column's group, modulo
// 256. More than two groups change at multiples of 32 columns alone.
int vitq_widen_int4(const uint8_t* packed, const int8_t* multiplier, const int8_t* zero, const uint8_t* group, int64_t groups, int8_t* out,
                    int64_t rows, int64_t k, void* stream);

// Rows that are made and quantized in one pass, each with the range that it then has: act(gate)·up, or a norm, or neither; leftᵀ·X·right of the
// row as a matrix X [A, B]; codes. What is multiplied is float16, clamped to ±65504, sums are float32. A gate's result is rounded to x's dtype.
typedef struct {
  const void* x;         // [m, columns], or with a gate [m, 2 columns], gate first
  int64_t x_stride;      // elements
  int32_t x_dtype, m, columns;
  int32_t gate;          // VitqActivation; none: no gate
  int32_t norm;          // VitqNorm, without a gate
  const float *weight, *bias;  // [columns] or null
  float eps;
  const void *left, *right;    // fp16, layout.py's pack_transform of [A, A] and of [B, B]; or null
  int32_t left_size, right_size;  // A and B, up to VITQ_TRANSFORM_SIZE; 0 for one that is null
  const float* clip;     // [2], what the least and the largest value of a row are multiplied with, the range then holding 0; or null
  int32_t qmin, qmax;
  int8_t* out;           // [m, columns]
  int64_t out_stride;
  float *row_scale, *row_shift;  // [m], as in VitqRows; row_shift may be null
  int32_t fragments;     // by kronecker.cu, where another kernel would take it (for tests)
} VitqTransformedRows;

#define VITQ_TRANSFORM_SIZE 256
int vitq_transformed_rows(const VitqTransformedRows* args, void* stream);
// 0 if a block of the current device can hold what such rows need, else VITQ_UNSUPPORTED
int vitq_transformed_rows_supports(int32_t columns, int32_t left_size, int32_t right_size);

// The rows of a cache of keys or of values: row (b, head, token) is at rows + b*strides[0] + head*strides[1] + token*strides[2], in bytes, multiples of
// 4. It holds, with bits up to 8, its scale, its shift unless symmetric, both float32, and its codes, of up to 4 bits two to a byte, low nibble first;
// with 16 its numbers, of the type of the queries.
typedef struct {
  void* rows;
  int64_t strides[3];
  int32_t bits, symmetric;
  int32_t aligned;               // rows and the first two strides by 16 bytes, of floats the third as well
} VitqCacheRows;

// New keys and values to the rows behind those that are there, row state[0] + t of token t. k, v and q by strides of b, head and token, in elements.
typedef struct {
  VitqCacheRows keys, values;
  int64_t* state;                // how many tokens there are, which grows by `tokens` if `advance` is set; a 0, which is one again afterwards
  const void *k, *v, *q;         // [batch, heads, tokens, dim], q of query_heads, a multiple of heads, or null
  int64_t k_strides[3], v_strides[3], q_strides[3];
  int32_t dtype;                 // of k, v, q, cos, sin, q_out
  int32_t batch, query_heads, heads, tokens, dim, room;  // room: rows of a head
  const float *key_clip, *value_clip;  // [2], what least and largest value are multiplied with; or null
  // Before, k and q are rotated by cos and sin [1 or batch, tokens, dim], dim contiguous, or null: x·cos + (-x₂, x₁)·sin of the halves of x, each step rounded;
  // then k, clamped to float16, is multiplied by `right`, fp16 [dim, dim], and q by `inverse`, float [dim, dim], or null (of a prompt in the type of q).
  const void *cos, *sin;
  int64_t rotary_strides[2];     // of b and token, elements
  const void* right;
  const float* inverse;
  void* q_out;                   // [batch, tokens, query_heads, dim] contiguous
  // The numbers that the new rows stand for, [batch, heads, tokens, dim] contiguous, or null; with out_before k_out is of k as it was rotated, before the rest;
  // with out_turned k_out is multiplied by `inverse` transposed, and q is not multiplied, which comes to the same: of more than 8 tokens in 16 bits, dim 64, 80,
  // 96 or 128, all rows of k, v, q, cos, sin and of what is written beside the cache at multiples of 16 bytes.
  void *k_out, *v_out;
  int32_t out_before, out_turned, advance;
  int32_t paired;                // the library's own
} VitqAppendRows;

int vitq_append_rows(const VitqAppendRows* args, void* stream);

// softmax(scale·q·Kᵀ + mask)·V of the last `tokens` of the state[0] tokens whose keys and values the rows hold. dim 64, 80, 96 or 128.
typedef struct {
  VitqCacheRows keys, values;
  const int64_t* state;
  const void* q;                 // fp16 or bf16 [batch, query_heads, tokens, dim]
  int64_t q_strides[3];          // of b, head and token, elements
  int32_t dtype;                 // of q and out
  int32_t batch, query_heads, heads, tokens, dim, room;
  const void* mask;              // bytes [batch, tokens, room], 0 where nothing is seen, strides of the first two; or null: all up to itself
  int64_t mask_batch, mask_row;
  float scale;
  int32_t window;                // the last so many tokens alone are seen; or 0
  void* out;                     // [batch, tokens, query_heads, dim]
  int64_t out_strides[3];        // elements
  float* workspace;              // [batch·heads·⌈query_heads/heads·tokens/8⌉, splits, 8, dim + 2], unless splits is 1
  int32_t splits;                // parts of the tokens, each for a block
} VitqCachedAttention;

int vitq_cached_attention(const VitqCachedAttention* args, void* stream);

int vitq_abi_version(void);
const char* vitq_error(int code);  // a few words for what a function above returned
const char* vitq_build(void);      // "sm_80 compute_80 sm_90a, CUTLASS 4.2.0": compute_ is PTX, for GPUs newer than all of these
int vitq_arch(void);               // 10·major + minor of the current device, or -1
int vitq_driver_version(void);     // newest CUDA that the driver runs, as 13020 for 13.2; 0 without a driver
int vitq_runtime_version(void);    // the CUDA that the library was built with

#ifdef __cplusplus
}
#endif
