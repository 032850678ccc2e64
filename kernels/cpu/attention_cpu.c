/* Packed attention on a CPU: one task is one sequence and one key head, with all query heads that share it.

A task copies its rows into scratch memory, in fp32 and padded to whole vectors, so that every product is the
one `multiply` below. Queries go by blocks, so memory is linear in the keys. Nothing depends on what else a
batch holds: a sequence has the same bits in any company (but for dropout, whose mask follows the place).
`attention_cpu.py` compiles this file; vectors are an extension that GCC and Clang share.

Layout legend: T packed tokens, H heads, HK key heads, G = H / HK, D head dimension. DP and KP: D and the
number of keys, rounded up to whole vectors.
*/

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined(__AVX512F__)
#define LANES 16
#elif defined(__AVX__)
#define LANES 8
#else
#define LANES 4
#endif
#define INLINE static inline __attribute__((always_inline))
#define BLOCK 72 /* queries computed at a time */
#define TILE 6   /* rows of multiply's register tile: 6 x 2 sums fit AVX2's 16 registers */
#define CALLS 16 /* of Philox, computed side by side */

typedef float vec __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef int32_t ivec __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

typedef struct {
  char *data;          /* (T, H, D) fp32 or bf16, the D elements of a row side by side */
  int64_t token, head; /* strides in elements */
} Rows;

typedef struct { /* in the order of attention_cpu.py's Call */
  Rows q, k, v, out, dout, dq, dk, dv;
  float *lse, *dlse;         /* (H, T); dlse may be null */
  int32_t *cu_q, *cu_k;      /* (B + 1,) */
  int32_t *sequences;        /* (count,) those to compute */
  int64_t count, total, key_heads, group, dim, longest_k, threads, bf16;
  int64_t left, right;       /* keys visible on either side of the diagonal, -1 for all */
  int64_t threshold;         /* halves of Philox words below it are dropped; 0 without dropout */
  uint64_t seed;
  float scale, softcap, keep_scale;
} Call;

typedef struct {
  float *data;
  int64_t stride; /* from row to row */
} Matrix;

typedef struct { /* one sequence and key head: where it lies, and the thread's scratch memory */
  int64_t q0, nq, k0, nk, kp, dp;
  Matrix k, v, dk, dv, kt, vt;       /* (nk, DP); kt and vt (DP, KP) */
  float *queries[4], *keys[4];       /* room for (BLOCK, DP) and (KP, DP), where rows cannot be used as they lie */
  float *p, *dropped, *ds, *slope;   /* (BLOCK, KP) */
  uint32_t *bits;                    /* (BLOCK, groups of 32 keys, 4 words, 4 calls) */
} Task;

static int64_t padded(int64_t n) { return (n + LANES - 1) / LANES * LANES; }

INLINE vec choose(ivec mask, vec a, vec b) { return (vec)((mask & (ivec)a) | (~mask & (ivec)b)); }

INLINE float highest(vec x) {
  float top = x[0];
  for (int i = 1; i < LANES; i++) top = x[i] > top ? x[i] : top;
  return top;
}

INLINE float sum(vec x) {
  float total = x[0];
  for (int i = 1; i < LANES; i++) total += x[i];
  return total;
}

/* e^x for x <= 88; 0 below -87.3, and NaN stays NaN (the polynomial of Cephes' expf). */
INLINE vec exponential(vec x) {
  const vec zero = {0};
  const float round = 12582912.0f; /* 1.5 * 2^23: a sum with it has no fraction */
  ivec small = x < -87.3f;
  x = choose(small, zero, x);
  vec n = (x * 1.44269504088896f + round) - round;
  vec r = x - n * 0.693359375f + n * 2.12194440e-4f;
  vec y = 1.9875691500e-4f * r + 1.3981999507e-3f;
  y = y * r + 8.3334519073e-3f;
  y = y * r + 4.1665795894e-2f;
  y = y * r + 1.6666665459e-1f;
  y = y * r + 5.0000001201e-1f;
  y = y * (r * r) + r + 1.0f;
  ivec power = (__builtin_convertvector(n, ivec) + 127) << 23;
  return choose(small, zero, y * (vec)power);
}

INLINE vec hyperbolic_tangent(vec x) {
  const vec end = {0};
  x = choose(x > 10.0f, end + 10.0f, choose(x < -10.0f, end - 10.0f, x));
  return 1.0f - 2.0f / (exponential(2.0f * x) + 1.0f);
}

/* One register tile of multiply: rows and columns (in vectors) are constants where it is inlined. */
INLINE void tile(const int rows, const int columns, int64_t depth, const float *a, int64_t a_row,
                 int64_t a_depth, const float *b, int64_t ldb, float *c, int64_t ldc, int add) {
  vec sums[TILE][2] = {0};
  for (int64_t i = 0; i < depth; i++, a += a_depth, b += ldb) {
    vec b0 = *(const vec *)b, b1 = *(const vec *)(b + (columns > 1 ? LANES : 0));
#pragma GCC unroll 6
    for (int r = 0; r < rows; r++) {
      sums[r][0] += a[r * a_row] * b0;
      if (columns > 1) sums[r][1] += a[r * a_row] * b1;
    }
  }
#pragma GCC unroll 6
  for (int r = 0; r < rows; r++) {
    for (int j = 0; j < columns; j++) {
      vec *to = (vec *)(c + r * ldc + j * LANES);
      if (add) sums[r][j] += *to;
      *to = sums[r][j];
    }
  }
}

/* c = a b, or c += a b: a (m, depth) with any strides, b (depth, n) and c (m, n) with n whole vectors. */
static void multiply(int64_t m, int64_t n, int64_t depth, const float *a, int64_t a_row, int64_t a_depth,
                     Matrix from, Matrix to, int add) {
  const float *b = from.data;
  float *c = to.data;
  const int64_t ldb = from.stride, ldc = to.stride;
#define COLUMNS(ROWS)                                                                                   \
  do {                                                                                                  \
    int64_t j = 0;                                                                                      \
    for (; j + 2 * LANES <= n; j += 2 * LANES)                                                          \
      tile(ROWS, 2, depth, a, a_row, a_depth, b + j, ldb, c + j, ldc, add);                             \
    if (j < n) tile(ROWS, 1, depth, a, a_row, a_depth, b + j, ldb, c + j, ldc, add);                    \
  } while (0)
  for (; m >= TILE; m -= TILE, a += TILE * a_row, c += TILE * ldc) COLUMNS(TILE);
  switch (m) {
    case 5: COLUMNS(5); break;
    case 4: COLUMNS(4); break;
    case 3: COLUMNS(3); break;
    case 2: COLUMNS(2); break;
    case 1: COLUMNS(1); break;
  }
}

static char *row_of(const Call *call, Rows x, int64_t token, int64_t head) {
  return x.data + (token * x.token + head * x.head) * (call->bf16 ? 2 : 4);
}

/* The place of a head's rows from a token on: as they lie where they are fp32 and whole vectors, else `room`. */
static Matrix place(const Call *call, Rows x, int64_t token, int64_t head, float *room) {
  if (call->bf16 || call->dim % LANES) return (Matrix){room, padded(call->dim)};
  return (Matrix){(float *)row_of(call, x, token, head), x.token};
}

/* The same with the n rows in it, padded with zeros. */
static Matrix load(const Call *call, Rows from, int64_t token, int64_t n, int64_t head, float *room) {
  Matrix to = place(call, from, token, head, room);
  for (int64_t i = 0; i < n && to.data == room; i++) {
    float *row = room + i * to.stride;
    const char *x = row_of(call, from, token + i, head);
    if (call->bf16)
      for (int64_t d = 0; d < call->dim; d++) ((uint32_t *)row)[d] = (uint32_t)((const uint16_t *)x)[d] << 16;
    else
      memcpy(row, x, call->dim * sizeof(float));
    for (int64_t d = call->dim; d < to.stride; d++) row[d] = 0;
  }
  return to;
}

/* Put n rows where they belong, unless they are there already; bf16 is rounded to nearest even. */
static void store(const Call *call, Matrix from, int64_t n, Rows to, int64_t token, int64_t head) {
  if (!call->bf16 && call->dim % LANES == 0) return;
  for (int64_t i = 0; i < n; i++) {
    const float *row = from.data + i * from.stride;
    char *x = row_of(call, to, token + i, head);
    if (!call->bf16) memcpy(x, row, call->dim * sizeof(float));
    for (int64_t d = 0; d < call->dim && call->bf16; d++) {
      uint32_t y = ((const uint32_t *)row)[d];
      int is_nan = (y & 0x7fffffff) > 0x7f800000;
      ((uint16_t *)x)[d] = is_nan ? 0x7fc0 : (y + 0x7fff + (y >> 16 & 1)) >> 16;
    }
  }
}

/* (n, DP) to (DP, KP), with zeros for the keys from n on. */
static Matrix transpose(Matrix from, int64_t n, int64_t dp, int64_t kp, float *room) {
  for (int64_t d = 0; d < dp; d += LANES) {
    for (int64_t j = 0; j < n; j++)
      for (int i = 0; i < LANES; i++) room[(d + i) * kp + j] = from.data[j * from.stride + d + i];
    for (int i = 0; i < LANES; i++)
      for (int64_t j = n; j < kp; j++) room[(d + i) * kp + j] = 0;
  }
  return (Matrix){room, kp};
}

/* Draw the halves that tell which keys dropout keeps, by the calls of philox_keep in attention_dropout.py. */
static void philox(const Call *call, const Task *t, int64_t first_query, int64_t rows, int64_t head) {
  const int64_t groups = (t->k0 % 32 + t->nk + 31) / 32, calls = rows * groups * 4;
  int64_t row = 0, group = 0;
  for (int64_t begin = 0; begin < calls; begin += CALLS) {
    uint32_t c0[CALLS], c1[CALLS], c2[CALLS], c3[CALLS];
    uint32_t k0 = (uint32_t)call->seed, k1 = (uint32_t)(call->seed >> 32);
    for (int i = 0; i < CALLS; i += 4) {
      for (int c = 0; c < 4; c++) {
        c0[i + c] = (uint32_t)(t->q0 + first_query + row);
        c1[i + c] = (uint32_t)(4 * (t->k0 / 32 + group) + c);
        c2[i + c] = (uint32_t)head;
        c3[i + c] = 0;
      }
      if (++group == groups) group = 0, row++;
    }
    for (int round = 0; round < 7; round++, k0 += 0x9E3779B9u, k1 += 0xBB67AE85u) {
      for (int i = 0; i < CALLS; i++) {
        uint64_t a = (uint64_t)c0[i] * 0xD2511F53u, b = (uint64_t)c2[i] * 0xCD9E8D57u;
        c0[i] = (uint32_t)(b >> 32) ^ c1[i] ^ k0;
        c2[i] = (uint32_t)(a >> 32) ^ c3[i] ^ k1;
        c1[i] = (uint32_t)b;
        c3[i] = (uint32_t)a;
      }
    }
    for (int i = 0; i < CALLS; i += 4) {
      uint32_t *to = t->bits + (begin + i) * 4;
      memcpy(to, c0 + i, 16), memcpy(to + 4, c1 + i, 16);
      memcpy(to + 8, c2 + i, 16), memcpy(to + 12, c3 + i, 16);
    }
  }
}

/* Multiply (rows, KP) weights by 0 or 1 / (1 - dropout_p). */
static void drop(const Call *call, const Task *t, int64_t rows, const float *from, float *to) {
  const int64_t groups = (t->k0 % 32 + t->nk + 31) / 32, keys = t->nk, kp = t->kp;
  const int16_t threshold = (int16_t)(call->threshold - 32768); /* the halves as they lie, with a sign */
  const float keep_scale = call->keep_scale;
  for (int64_t i = 0; i < rows; i++, from += kp, to += kp) {
    const int16_t *halves = (const int16_t *)(t->bits + i * groups * 16) + t->k0 % 32;
#pragma GCC ivdep
    for (int64_t j = 0; j < keys; j++) to[j] = from[j] * (halves[j] >= threshold ? keep_scale : 0.0f);
  }
}

/* The scores of a block of queries, with their cap, in t->p, and the derivative of the cap in t->slope. */
static void score(const Call *call, const Task *t, Matrix q, int64_t rows) {
  multiply(rows, t->kp, t->dp, q.data, q.stride, 1, t->kt, (Matrix){t->p, t->kp}, 0);
  for (int64_t i = 0; i < rows * t->kp; i += LANES) {
    vec *p = (vec *)(t->p + i);
    *p *= call->scale;
    if (call->softcap == 0) continue;
    vec capped = hyperbolic_tangent(*p / call->softcap);
    *p = capped * call->softcap;
    *(vec *)(t->slope + i) = 1.0f - capped * capped;
  }
}

/* Turn the scores of one query into e^(score - top), 0 where it sees no key; returns whether it sees any. */
INLINE int weigh(const Call *call, const Task *t, int64_t query, float *p, float *top, float *total) {
  const vec nothing = {0};
  int64_t diagonal = query + t->nk - t->nq; /* the last query faces the last key */
  int64_t low = call->left < 0 || diagonal < call->left ? 0 : diagonal - call->left;
  int64_t high = call->right < 0 || diagonal + call->right >= t->nk ? t->nk : diagonal + call->right + 1;
  if (low >= high) {
    memset(p, 0, t->kp * sizeof(float));
    return 0;
  }
  ivec key;
  for (int i = 0; i < LANES; i++) key[i] = i;
  if (total) {
    vec tops = nothing - INFINITY;
    for (int64_t j = 0; j < t->kp; j += LANES) {
      ivec visible = (key + (int32_t)j >= (int32_t)low) & (key + (int32_t)j < (int32_t)high);
      vec s = choose(visible, *(vec *)(p + j), nothing - INFINITY);
      tops = choose(s > tops, s, tops);
    }
    *top = highest(tops);
  }
  vec totals = nothing;
  for (int64_t j = 0; j < t->kp; j += LANES) {
    ivec visible = (key + (int32_t)j >= (int32_t)low) & (key + (int32_t)j < (int32_t)high);
    vec weight = choose(visible, exponential(*(vec *)(p + j) - *top), nothing);
    *(vec *)(p + j) = weight;
    totals += weight;
  }
  if (total) *total = sum(totals);
  return 1;
}

static void forward(const Call *call, const Task *t, int64_t head) {
  for (int64_t first = 0; first < t->nq; first += BLOCK) {
    int64_t rows = t->nq - first < BLOCK ? t->nq - first : BLOCK, token = t->q0 + first;
    Matrix q = load(call, call->q, token, rows, head, t->queries[0]);
    Matrix out = place(call, call->out, token, head, t->queries[1]);
    score(call, t, q, rows);
    for (int64_t i = 0; i < rows; i++) {
      float top, total, *p = t->p + i * t->kp;
      int any = weigh(call, t, first + i, p, &top, &total);
      call->lse[head * call->total + token + i] = any ? logf(total) + top : -INFINITY;
      for (int64_t j = 0; j < t->kp && any; j += LANES) *(vec *)(p + j) *= 1 / total;
    }
    if (call->threshold) {
      philox(call, t, first, rows, head);
      drop(call, t, rows, t->p, t->p);
    }
    multiply(rows, t->dp, t->nk, t->p, t->kp, 1, t->v, out, 0);
    store(call, out, rows, call->out, token, head);
  }
}

static void backward(const Call *call, const Task *t, int64_t head) {
  const int64_t kp = t->kp;
  for (int64_t first = 0; first < t->nq; first += BLOCK) {
    int64_t rows = t->nq - first < BLOCK ? t->nq - first : BLOCK, token = t->q0 + first;
    Matrix q = load(call, call->q, token, rows, head, t->queries[0]);
    Matrix out = load(call, call->out, token, rows, head, t->queries[1]);
    Matrix dout = load(call, call->dout, token, rows, head, t->queries[2]);
    Matrix dq = place(call, call->dq, token, head, t->queries[3]);
    score(call, t, q, rows);
    multiply(rows, kp, t->dp, dout.data, dout.stride, 1, t->vt, (Matrix){t->ds, kp}, 0);
    for (int64_t i = 0; i < rows; i++)
      weigh(call, t, first + i, t->p + i * kp, call->lse + head * call->total + token + i, NULL);
    const float *dropped = t->p;
    if (call->threshold) {
      philox(call, t, first, rows, head);
      drop(call, t, rows, t->ds, t->ds);
      drop(call, t, rows, t->p, t->dropped);
      dropped = t->dropped;
    }
    for (int64_t i = 0; i < rows; i++) {
      vec deltas = {0};
      for (int64_t d = 0; d < t->dp; d += LANES)
        deltas += *(vec *)(out.data + i * out.stride + d) * *(vec *)(dout.data + i * dout.stride + d);
      float delta = sum(deltas);
      if (call->dlse) delta -= call->dlse[head * call->total + token + i];
      for (int64_t j = i * kp; j < (i + 1) * kp; j += LANES) {
        vec ds = (*(vec *)(t->ds + j) - delta) * *(vec *)(t->p + j) * call->scale;
        if (call->softcap != 0) ds *= *(vec *)(t->slope + j);
        *(vec *)(t->ds + j) = ds;
      }
    }
    int add = head % call->group || first;
    multiply(rows, t->dp, t->nk, t->ds, kp, 1, t->k, dq, 0);
    multiply(t->nk, t->dp, rows, dropped, 1, kp, dout, t->dv, add);
    multiply(t->nk, t->dp, rows, t->ds, 1, kp, q, t->dk, add);
    store(call, dq, rows, call->dq, token, head);
  }
}

/* Give a thread's scratch memory to its parts; returns the number of floats that they take. */
static int64_t divide(const Call *call, Task *t, float *memory) {
  const int64_t dp = padded(call->dim), kp = padded(call->longest_k);
  float **scores[] = {&t->p, &t->dropped, &t->ds, &t->slope}, **transposed[] = {&t->kt.data, &t->vt.data};
  int64_t used = 0;
  for (int i = 0; i < 4; i++, used += BLOCK * kp) *scores[i] = memory + used;
  for (int i = 0; i < 2; i++, used += kp * dp) *transposed[i] = memory + used;
  for (int i = 0; i < 4; i++, used += BLOCK * dp) t->queries[i] = memory + used;
  for (int i = 0; i < 4; i++, used += kp * dp) t->keys[i] = memory + used;
  t->bits = (uint32_t *)(memory + used);
  return used + (BLOCK * ((call->longest_k + 62) / 32) + CALLS) * 16;
}

static int attend(const Call *call, int is_backward) {
  int failed = 0;
#pragma omp parallel num_threads((int)call->threads)
  {
    Task t;
    float *memory = NULL;
    if (posix_memalign((void **)&memory, 64, divide(call, &t, NULL) * sizeof(float))) memory = NULL;
    if (memory) divide(call, &t, memory);
#pragma omp for schedule(dynamic)
    for (int64_t i = 0; i < call->count * call->key_heads; i++) {
      if (!memory) {
        failed = 1;
        continue;
      }
      const int64_t sequence = call->sequences[i / call->key_heads], key_head = i % call->key_heads;
      t.q0 = call->cu_q[sequence], t.nq = call->cu_q[sequence + 1] - t.q0;
      t.k0 = call->cu_k[sequence], t.nk = call->cu_k[sequence + 1] - t.k0;
      t.kp = padded(t.nk), t.dp = padded(call->dim);
      t.k = load(call, call->k, t.k0, t.nk, key_head, t.keys[0]);
      t.v = load(call, call->v, t.k0, t.nk, key_head, t.keys[1]);
      t.kt = transpose(t.k, t.nk, t.dp, t.kp, t.kt.data);
      if (is_backward) {
        t.vt = transpose(t.v, t.nk, t.dp, t.kp, t.vt.data);
        t.dk = place(call, call->dk, t.k0, key_head, t.keys[2]);
        t.dv = place(call, call->dv, t.k0, key_head, t.keys[3]);
        for (int64_t j = 0; j < t.nk && t.nq == 0; j++) {
          memset(t.dk.data + j * t.dk.stride, 0, t.dp * sizeof(float));
          memset(t.dv.data + j * t.dv.stride, 0, t.dp * sizeof(float));
        }
      }
      for (int64_t head = key_head * call->group; head < (key_head + 1) * call->group; head++)
        (is_backward ? backward : forward)(call, &t, head);
      if (is_backward) {
        store(call, t.dk, t.nk, call->dk, t.k0, key_head);
        store(call, t.dv, t.nk, call->dv, t.k0, key_head);
      }
    }
    free(memory);
  }
  return failed;
}

int attention_forward(const Call *call) { return attend(call, 0); }

int attention_backward(const Call *call) { return attend(call, 1); }
