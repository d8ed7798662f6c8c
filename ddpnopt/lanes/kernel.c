/* Fully connected nets, a run in every lane of the machine's vectors.
 *
 * A block is LANES runs side by side: each number of a net is a vector with one entry per run, and every
 * operation is elementwise across runs. No sum runs over lanes, so a run's bits depend neither on its lane nor on
 * who sits in the others, and a block of small nets stays in the cache for as many steps as it is asked to do.
 *
 * The mathematics is that of ddpnopt/ddp (backward.py, outer_product.py, forward.py) and ddpnopt/optimizers, which
 * remain the oracle; names are theirs. Sums run in the order of their index, whatever the tiles are.
 *
 * Index legend: t layer, b sample, i inputs, o outputs, k summed over. An array called x[b][i] is one of vectors.
 */
#include <math.h>
#include <stdint.h>
#include <string.h>

#ifdef DOUBLE
typedef double real;
typedef int64_t whole;
#define SCALAR_LOG log
#else
typedef float real;
typedef int32_t whole;
#define SCALAR_LOG logf
#endif

#if defined(__AVX512F__)
#define VECTOR_BYTES 64
#elif defined(__AVX__)
#define VECTOR_BYTES 32
#else
#define VECTOR_BYTES 16
#endif
#define LANES ((int)(VECTOR_BYTES / sizeof(real)))
/* 16 accumulators where there are 32 registers, else 8. */
#if VECTOR_BYTES == 64
#define TILE_N 4
#else
#define TILE_N 2
#endif
#define TILE_M 4

typedef real vec __attribute__((vector_size(VECTOR_BYTES)));
typedef whole ivec __attribute__((vector_size(VECTOR_BYTES)));

#define INLINE static inline __attribute__((always_inline))

enum { TANH = 0, RELU = 1, SIGMOID = 2, LEAKY_RELU = 3, IDENTITY = 4 };
enum { CROSS_ENTROPY = 0, MSE = 1, MMC = 2 };
enum { IDENTITY_M = 0, RMSPROP = 1, ADAM = 2 };
enum { OPEN_LOOP = 0, OUTER_PRODUCT = 1, FULL = 2 };

/* What the runs of a block share. Mirrored by ddpnopt/lanes/library.py. */
typedef struct {
    int32_t layers, batch, hidden_activation, output_activation, loss;
    int32_t preconditioner, form, exact_hessian, psd, per_sample_moment;
    int32_t has_decay, has_momentum, has_reg, baseline;
    double share, weight, to_loss; /* Units of the value function */
    const int32_t *widths;         /* [layers + 1] */
    const real *centers;           /* [classes][classes] of MMC, else null */
} program;

/* One block. Arrays of vectors are aligned; those with two copies are read from one and written to the other. */
typedef struct {
    vec *u[2], *velocity[2], *moment1[2], *moment2[2]; /* each [controls] */
    const vec *rates;        /* [10], in the order of the names below */
    const double *betas;     /* [2][LANES]: β₁, β₂ */
    const int64_t *seed_row; /* [LANES] row of each run's batches */
    vec *last_loss, *loss;   /* mean loss of the batch before and of this one */
    double *running;         /* [2][LANES] sums since they were last taken: batch losses, right answers */
    const ivec *alive;       /* -1 where a run is in the lane, else 0 */
    ivec *bad_loss, *bad_controls; /* set where a lane in use left the finite numbers */
    int64_t current;         /* which copy holds the state */
} block;

/* η, ε, λ, μ, κ; β₂ (ρ of RMSprop), 1 - β₂, β₁, 1 - β₁, eps */
enum { RATE, REG, DECAY, MOMENTUM, SCALE, BETA2, REST2, BETA1, REST1, EPS };

int lanes(void) { return LANES; }

INLINE vec splat(real x) { return x - (vec){0}; }
INLINE vec choose(ivec mask, vec yes, vec no) { return (vec)((mask & (ivec)yes) | (~mask & (ivec)no)); }
INLINE vec vmax(vec a, vec b) { return choose(a > b, a, b); }

/* --- elementary functions: a few units in the last place, NaN in and NaN out --- */

#ifdef DOUBLE
#define MANTISSA 52
#define BIAS 1023
#define EXP_LOW -708.0
#define EXP_HIGH 709.0
#define ROUNDER 6755399441055744.0 /* 1.5 · 2^52: adding it rounds to a whole number */
#define LN2_HIGH 0x1.62e42fefa0000p-1
#define LN2_LOW 0x1.cf79abc9e3b3ap-40
#define TERMS 14
#else
#define MANTISSA 23
#define BIAS 127
#define EXP_LOW -87.0f
#define EXP_HIGH 88.0f
#define ROUNDER 12582912.0f
#define LN2_HIGH 0x1.62e000p-1f
#define LN2_LOW 0x1.0bfbe8p-15f
#define TERMS 8
#endif

static const double RECIPROCAL_FACTORIAL[16] = {
    1.0, 1.0, 1.0 / 2, 1.0 / 6, 1.0 / 24, 1.0 / 120, 1.0 / 720, 1.0 / 5040, 1.0 / 40320, 1.0 / 362880,
    1.0 / 3628800, 1.0 / 39916800, 1.0 / 479001600, 1.0 / 6227020800.0, 1.0 / 87178291200.0, 1.0 / 1307674368000.0};

/* e^x = 2^n (1 + p) with |ln 2 · n - x| at most ln 2 / 2; beyond the range of numbers x is held at its ends. */
INLINE void exp_parts(vec x, vec *power, vec *p) {
    x = choose(x < splat((real)EXP_LOW), splat((real)EXP_LOW), x);
    x = choose(x > splat((real)EXP_HIGH), splat((real)EXP_HIGH), x);
    vec n = (x * (real)1.4426950408889634 + (real)ROUNDER) - (real)ROUNDER;
    vec r = (x - n * (real)LN2_HIGH) - n * (real)LN2_LOW;
    vec sum = splat((real)RECIPROCAL_FACTORIAL[TERMS]);
#pragma GCC unroll 16
    for (int k = TERMS - 1; k >= 1; k--) sum = sum * r + (real)RECIPROCAL_FACTORIAL[k];
    *p = sum * r;
    *power = (vec)((__builtin_convertvector(n, ivec) + BIAS) << MANTISSA);
}

INLINE vec vexp(vec x) {
    vec power, p;
    exp_parts(x, &power, &p);
    return power + power * p;
}

/* tanh |x| = -m / (2 + m) with m = e^(-2|x|) - 1, which keeps its digits near zero. */
INLINE vec vtanh(vec x) {
    vec power, p;
    vec size = choose(x < splat(0), -x, x);
    exp_parts(size * (real)-2, &power, &p);
    vec m = power * p + (power - (real)1);
    vec y = -m / ((real)2 + m);
    return choose(x < splat(0), -y, y);
}

INLINE vec vsigmoid(vec x) { return (real)1 / ((real)1 + vexp(-x)); }

INLINE vec vsqrt(vec x) {
    vec y;
#ifdef DOUBLE
    for (int l = 0; l < LANES; l++) y[l] = __builtin_sqrt(x[l]);
#else
    for (int l = 0; l < LANES; l++) y[l] = __builtin_sqrtf(x[l]);
#endif
    return y;
}

INLINE vec vlog(vec x) {
    vec y = x;
    for (int l = 0; l < LANES; l++) y[l] = SCALAR_LOG(x[l]);
    return y;
}

INLINE vec activate(int kind, vec h) {
    switch (kind) {
    case TANH: return vtanh(h);
    case RELU: return choose(h <= splat(0), splat(0), h);
    case SIGMOID: return vsigmoid(h);
    case LEAKY_RELU: return choose(h <= splat(0), h * (real)0.01, h);
    default: return h;
    }
}

/* σ' from y = σ(h), which each of these determines. */
INLINE vec slope_of(int kind, vec y) {
    switch (kind) {
    case TANH: return (real)1 - y * y;
    case RELU: return choose(y > splat(0), splat(1), y * (real)0);
    case SIGMOID: return y * ((real)1 - y);
    case LEAKY_RELU: return choose(y > splat(0), splat(1), splat((real)0.01));
    default: return splat(1);
    }
}

/* --- products --- */

/* An operand: entry (m, n) is at data[m * row + n * column]. */
typedef struct {
    const vec *data;
    int64_t row, column;
} matrix;

INLINE matrix as(const vec *data, int64_t row, int64_t column) {
    matrix found = {data, row, column};
    return found;
}

INLINE void tile(int rows, int columns, int depth, matrix a, matrix b, matrix bias, vec *c, int64_t row,
                 int64_t column) {
    vec sum[TILE_M][TILE_N];
#pragma GCC unroll 4
    for (int m = 0; m < rows; m++)
#pragma GCC unroll 4
        for (int n = 0; n < columns; n++)
            sum[m][n] = bias.data ? bias.data[m * bias.row + n * bias.column] : splat(0);
    for (int k = 0; k < depth; k++) {
        vec right[TILE_N];
#pragma GCC unroll 4
        for (int n = 0; n < columns; n++) right[n] = b.data[k * b.row + n * b.column];
#pragma GCC unroll 4
        for (int m = 0; m < rows; m++) {
            vec left = a.data[m * a.row + k * a.column];
#pragma GCC unroll 4
            for (int n = 0; n < columns; n++) sum[m][n] += left * right[n];
        }
    }
#pragma GCC unroll 4
    for (int m = 0; m < rows; m++)
#pragma GCC unroll 4
        for (int n = 0; n < columns; n++) c[m * row + n * column] = sum[m][n];
}

#define TILES_OF(R)                                                                                  \
    switch (columns) {                                                                               \
    case 1: tile(R, 1, depth, a, b, bias, c, row, column); break;                                    \
    case 2: tile(R, 2, depth, a, b, bias, c, row, column); break;                                    \
    case 3: tile(R, 3 < TILE_N ? 3 : TILE_N, depth, a, b, bias, c, row, column); break;              \
    default: tile(R, TILE_N, depth, a, b, bias, c, row, column);                                     \
    }

static void any_tile(int rows, int columns, int depth, matrix a, matrix b, matrix bias, vec *c, int64_t row,
                     int64_t column) {
    switch (rows) {
    case 1: TILES_OF(1) break;
    case 2: TILES_OF(2) break;
    case 3: TILES_OF(3) break;
    default: TILES_OF(4)
    }
}

/* C (M, N) = bias + A (M, K) B (K, N); the bias may be nothing, or repeat itself by a stride of zero.
 * With `lower`, only tiles that touch the lower triangle are computed. */
static void product(int rows, int columns, int depth, matrix a, matrix b, matrix bias, vec *c, int64_t row,
                    int64_t column, int lower) {
    for (int n = 0; n < columns; n += TILE_N) {
        int wide = columns - n < TILE_N ? columns - n : TILE_N;
        int first = lower ? n / TILE_M * TILE_M : 0;
        for (int m = first; m < rows; m += TILE_M) {
            int high = rows - m < TILE_M ? rows - m : TILE_M;
            matrix above = {bias.data ? bias.data + m * bias.row + n * bias.column : 0, bias.row, bias.column};
            any_tile(high, wide, depth, as(a.data + m * a.row, a.row, a.column),
                     as(b.data + n * b.column, b.row, b.column), above, c + m * row + n * column, row, column);
        }
    }
}

static const matrix NOTHING = {0, 0, 0};

/* --- layers --- */

/* h[b][o] = W x + b, with u[o][ī]. */
static void affine(int batch, int n, int o, const vec *x, const vec *u, vec *h) {
    product(batch, o, n, as(x, n, 1), as(u, 1, n + 1), as(u + n, 0, n + 1), h, o, 1, 0);
}

/* W δx, without the bias. */
static void push_forward(int batch, int n, int o, const vec *dx, const vec *u, vec *dh) {
    product(batch, o, n, as(dx, n, 1), as(u, 1, n + 1), NOTHING, dh, o, 1, 0);
}

/* Wᵀ v of every row: v[b][o] to q[b][i]. */
static void pull_back(int batch, int n, int o, const vec *v, const vec *u, vec *q) {
    product(batch, n, o, as(v, o, 1), as(u, n + 1, 1), NOTHING, q, n, 1, 0);
}

/* Σ_b v x̄ᵀ: g[o][ī]. */
static void outer_sum(int batch, int n, int o, const vec *v, const vec *x, vec *g) {
    product(o, n, batch, as(v, 1, o), as(x, n, 1), NOTHING, g, n + 1, 1, 0);
    for (int a = 0; a < o; a++) {
        vec sum = splat(0);
        for (int b = 0; b < batch; b++) sum += v[b * o + a];
        g[a * (n + 1) + n] = sum;
    }
}

static void multiply(int64_t count, const vec *a, const vec *b, vec *c) {
    for (int64_t j = 0; j < count; j++) c[j] = a[j] * b[j];
}

/* --- memory of a step --- */

#define MOST_LAYERS 65 /* config.MAX_DEPTH hidden ones and the read-out */
int most_layers(void) { return MOST_LAYERS; }

typedef struct {
    vec *x[MOST_LAYERS + 1], *slope[MOST_LAYERS]; /* x[t]: [b][n_t]; slope[t]: of σ after layer t */
    vec *V_h[MOST_LAYERS], *z_h[MOST_LAYERS]; /* of layer t: [b][o] */
    vec *w[MOST_LAYERS];             /* weight of z zᵀ as it enters layer t: [b] */
    vec *A[MOST_LAYERS];             /* of layer t, full form: [b][o][i] */
    vec *inverse[MOST_LAYERS];       /* diagonal M⁻¹ of layer t: [o][ī] */
    vec *V, *z, *Q, *q;     /* [b][widest] */
    vec *a, *s, *square, *dx, *dh;
    vec *V_xx, *V_hh, *X, *system, *right; /* V_xx of all samples, the others of one */
    vec *gradient;          /* [o][ī] of the largest layer */
    int64_t *label;         /* [b][LANES] */
} memory;

static int act(const program *p, int t) {
    return t + 1 < p->layers ? p->hidden_activation : p->output_activation;
}

static int64_t largest(const program *p) {
    int64_t most = 0;
    for (int t = 0; t < p->layers; t++) {
        int64_t size = (int64_t)p->widths[t + 1] * (p->widths[t] + 1);
        if (size > most) most = size;
    }
    return most;
}

static int64_t widest(const program *p) {
    int64_t most = 0;
    for (int t = 0; t <= p->layers; t++)
        if (p->widths[t] > most) most = p->widths[t];
    return most;
}

/* The widest state that a value function is taken at: all but the input. */
static int64_t widest_value(const program *p) {
    int64_t most = 0;
    for (int t = 1; t <= p->layers; t++)
        if (p->widths[t] > most) most = p->widths[t];
    return most;
}

/* Lay the arrays out; with no memory, only count. Returns vectors needed. */
static int64_t lay_out(const program *p, memory *at, vec *start) {
    int64_t used = 0;
    const int64_t batch = p->batch;
#define TAKE(field, count)              \
    do {                                \
        if (at) at->field = start + used; \
        used += (count);                \
    } while (0)
    const int64_t wide = widest(p), value = widest_value(p);
    const int feedback = p->form != OPEN_LOOP, full = p->form == FULL;
    for (int t = 0; t <= p->layers; t++) TAKE(x[t], batch * p->widths[t]);
    for (int t = 0; t < p->layers; t++) {
        const int64_t o = p->widths[t + 1], n = p->widths[t];
        TAKE(slope[t], batch * o);
        TAKE(V_h[t], batch * o);
        TAKE(z_h[t], feedback && !full ? batch * o : 0);
        TAKE(w[t], feedback && !full ? batch : 0);
        TAKE(A[t], full && t > 0 ? batch * o * n : 0);
        TAKE(inverse[t], p->preconditioner != IDENTITY_M ? o * (n + 1) : 0);
    }
    TAKE(V, batch * value);
    TAKE(z, batch * value);
    TAKE(Q, batch * value);
    TAKE(q, batch * value);
    TAKE(a, batch * value);
    TAKE(s, batch * value);
    TAKE(square, batch * (wide + value));
    TAKE(dx, batch * value);
    TAKE(dh, batch * value);
    TAKE(V_xx, full ? batch * value * value : 0);
    TAKE(V_hh, full ? value * value : 0);
    TAKE(X, full ? value * value : 0);
    TAKE(system, full && p->psd ? value * value : 0);
    TAKE(right, full && p->psd ? value * (value + 1) : 0);
    TAKE(gradient, 2 * largest(p));
    if (at) at->label = (int64_t *)(start + used);
    used += (batch * LANES * (int64_t)sizeof(int64_t) + VECTOR_BYTES - 1) / VECTOR_BYTES;
#undef TAKE
    return used;
}

/* Samples that metrics are taken on at once. */
#define SAMPLES 8

/* Vectors of workspace that one thread needs, for steps and for metrics. */
int64_t workspace(const program *p) {
    const int64_t step = lay_out(p, 0, 0), metrics = 2 * SAMPLES * widest(p);
    return step > metrics ? step : metrics;
}

int64_t controls(const program *p) {
    int64_t count = 0;
    for (int t = 0; t < p->layers; t++) count += (int64_t)p->widths[t + 1] * (p->widths[t] + 1);
    return count;
}

/* --- loss --- */

/* φ of one sample and, if asked, ∇φ in the place of y; labels of each lane. Returns φ. */
INLINE vec loss_of(const program *p, vec *y, const int64_t *label, int gradient) {
    const int classes = p->widths[p->layers];
    if (p->loss == CROSS_ENTROPY) {
        vec most = y[0], sum = splat(0), picked;
        for (int c = 1; c < classes; c++) most = vmax(y[c], most);
        for (int l = 0; l < LANES; l++) picked[l] = y[label[l]][l];
        picked -= most;
        for (int c = 0; c < classes; c++) {
            vec e = vexp(y[c] - most);
            sum += e;
            if (gradient) y[c] = e;
        }
        if (gradient) {
            vec part = (real)1 / sum;
            for (int c = 0; c < classes; c++) y[c] *= part;
            for (int l = 0; l < LANES; l++) y[label[l]][l] -= (real)1;
        }
        return vlog(sum) - picked;
    }
    vec sum = splat(0);
    for (int c = 0; c < classes; c++) {
        vec target;
        if (p->loss == MSE)
            for (int l = 0; l < LANES; l++) target[l] = label[l] == c ? (real)1 : (real)0;
        else
            for (int l = 0; l < LANES; l++) target[l] = p->centers[label[l] * classes + c];
        vec off = y[c] - target;
        sum += off * off;
        if (gradient) y[c] = p->loss == MSE ? off : off + off;
    }
    return p->loss == MSE ? sum * (real)0.5 : sum;
}

/* 1 in the lanes whose largest entry is the label's, the first of equals counting. */
INLINE vec right_of(const vec *y, int classes, const int64_t *label) {
    vec most = y[0];
    vec place = splat(0), wanted;
    for (int c = 1; c < classes; c++) {
        ivec more = y[c] > most;
        most = choose(more, y[c], most);
        place = choose(more, splat((real)c), place);
    }
    for (int l = 0; l < LANES; l++) wanted[l] = (real)label[l];
    return choose(place == wanted, splat(1), splat(0));
}

/* --- one step --- */

typedef struct {
    const program *p;
    const block *blk;
    memory *at;
    const vec *u;       /* before the step */
    vec *next;          /* after it */
    int64_t step;       /* from 1 */
    vec finite;         /* 0 where all new controls are finite, else NaN */
} stepping;

static int64_t offset(const program *p, int t) {
    int64_t at = 0;
    for (int s = 0; s < t; s++) at += (int64_t)p->widths[s + 1] * (p->widths[s] + 1);
    return at;
}

/* Gather the batch: x_0[b][i], a run's own samples in its lane. */
static void gather(const program *p, const block *blk, memory *at, const real *inputs, const int64_t *targets,
                   const int64_t *rows, int64_t per_seed) {
    const int n = p->widths[0];
    for (int b = 0; b < p->batch; b++) {
        real *x = (real *)(at->x[0] + (int64_t)b * n);
        for (int l = 0; l < LANES; l++) {
            const int64_t row = rows[blk->seed_row[l] * per_seed + b];
            at->label[b * LANES + l] = targets[row];
            const real *sample = inputs + row * n;
            for (int i = 0; i < n; i++) x[i * LANES + l] = sample[i];
        }
    }
}

static void forward(const stepping *now) {
    const program *p = now->p;
    memory *at = now->at;
    const vec *u = now->u;
    for (int t = 0; t < p->layers; t++) {
        const int n = p->widths[t], o = p->widths[t + 1], kind = act(p, t);
        vec *y = at->x[t + 1], *slope = at->slope[t];
        affine(p->batch, n, o, at->x[t], u, y);
        if (kind != IDENTITY)
            for (int64_t j = 0; j < (int64_t)p->batch * o; j++) {
                y[j] = activate(kind, y[j]);
                slope[j] = slope_of(kind, y[j]);
            }
        u += (int64_t)o * (n + 1);
    }
}

/* V_h = σ' ⊙ V. */
static void through_sigma(const program *p, int t, memory *at, const vec *V, vec *V_h) {
    const int64_t count = (int64_t)p->batch * p->widths[t + 1];
    if (act(p, t) == IDENTITY)
        memcpy(V_h, V, (size_t)count * sizeof(vec));
    else
        multiply(count, at->slope[t], V, V_h);
}

/* d = Σ̄ + λu of a sum over the batch. */
static void direction(const stepping *now, int64_t from, int64_t count, vec *gradient) {
    const real weight = (real)now->p->weight;
    const vec decay = now->blk->rates[DECAY];
    if (weight != 1)
        for (int64_t j = 0; j < count; j++) gradient[j] *= weight;
    if (now->p->has_decay)
        for (int64_t j = 0; j < count; j++) gradient[j] += decay * now->u[from + j];
}

/* 1 / (1 - βᵏ) of Adam at step k. */
static vec bias_correction(const double *beta, int64_t step) {
    vec found;
    for (int l = 0; l < LANES; l++) found[l] = (real)(1.0 / (1.0 - pow(beta[l], (double)step)));
    return found;
}

/* Take in a layer's batch: M⁻¹ = 1 / (sqrt(v) + eps) of RMSprop and Adam, from the mean gradient. */
static void observe(const stepping *now, int t, vec *gradient, vec *scratch) {
    const program *p = now->p;
    memory *at = now->at;
    const int n = p->widths[t], o = p->widths[t + 1], batch = p->batch;
    const int64_t from = offset(p, t), count = (int64_t)o * (n + 1);
    const vec *rates = now->blk->rates, *u = now->u + from;
    const vec beta2 = rates[BETA2], rest = rates[REST2];
    const vec *old = now->blk->moment2[now->blk->current] + from;
    vec *new = now->blk->moment2[1 - now->blk->current] + from, *inverse = at->inverse[t];
    const vec corrected =
        p->preconditioner == ADAM ? bias_correction(now->blk->betas + LANES, now->step) : splat(1);
    if (p->per_sample_moment) {
        vec *x_square = at->square, *V_square = at->square + (int64_t)batch * n;
        multiply((int64_t)batch * n, at->x[t], at->x[t], x_square);
        multiply((int64_t)batch * o, at->V_h[t], at->V_h[t], V_square);
        outer_sum(batch, n, o, V_square, x_square, scratch);
    }
    const real to_square = (real)(p->to_loss * p->to_loss / batch);
    for (int64_t j = 0; j < count; j++) {
        vec s2 = gradient[j] * gradient[j];
        if (p->per_sample_moment) {
            s2 = scratch[j] * to_square;
            if (p->has_decay) {
                vec shift = rates[DECAY] * u[j];
                s2 += shift * ((real)2 * gradient[j] - shift);
            }
        }
        vec v = beta2 * old[j] + rest * s2;
        new[j] = v;
        vec M = vsqrt(v * corrected) + rates[EPS];
        /* NaN where M is infinite: zero would hold its entry of u for good. */
        inverse[j] = choose(M > splat((real)(sizeof(real) == 4 ? 3.4028234663852886e38 : 1.7976931348623157e308)),
                            splat((real)NAN), (real)1 / M);
    }
}

/* u ← u - η v with v ← μ v + M⁻¹ d. */
static void descend(stepping *now, int t, const vec *d) {
    const program *p = now->p;
    const block *blk = now->blk;
    const int64_t from = offset(p, t), count = (int64_t)p->widths[t + 1] * (p->widths[t] + 1);
    const int old = (int)blk->current, fresh = 1 - old;
    const vec rate = blk->rates[RATE], momentum = blk->rates[MOMENTUM];
    const vec beta1 = blk->rates[BETA1], rest = blk->rates[REST1];
    const vec corrected = p->preconditioner == ADAM ? bias_correction(blk->betas, now->step) : splat(1);
    vec finite = now->finite;
    const vec *u = now->u + from, *inverse = now->at->inverse[t];
    vec *next = now->next + from;
    for (int64_t j = 0; j < count; j++) {
        vec step = d[j];
        if (p->preconditioner == RMSPROP) step = step * inverse[j];
        if (p->preconditioner == ADAM) {
            vec m = beta1 * blk->moment1[old][from + j] + rest * step;
            blk->moment1[fresh][from + j] = m;
            step = m * inverse[j] * corrected;
        }
        if (p->has_momentum) {
            step = momentum * blk->velocity[old][from + j] + step;
            blk->velocity[fresh][from + j] = step;
        }
        next[j] = u[j] - rate * step;
        finite += next[j] * (real)0;
    }
    now->finite = finite;
}

/* Gradient and moments of a layer, from its V_h. */
static void learn(const stepping *now, int t) {
    const program *p = now->p;
    const int n = p->widths[t], o = p->widths[t + 1];
    vec *gradient = now->at->gradient;
    outer_sum(p->batch, n, o, now->at->V_h[t], now->at->x[t], gradient);
    direction(now, offset(p, t), (int64_t)o * (n + 1), gradient);
    observe(now, t, gradient, gradient + largest(p));
}

/* Backpropagation with M⁻¹: ddpnopt/optimizers/preconditioned.py. */
static void baseline_step(stepping *now) {
    const program *p = now->p;
    memory *at = now->at;
    for (int t = p->layers - 1; t >= 0; t--) {
        const int n = p->widths[t], o = p->widths[t + 1];
        through_sigma(p, t, at, at->V, at->V_h[t]);
        if (t > 0) pull_back(p->batch, n, o, at->V_h[t], now->u + offset(p, t), at->V);
        if (p->preconditioner != IDENTITY_M)
            learn(now, t);
        else {
            outer_sum(p->batch, n, o, at->V_h[t], at->x[t], at->gradient);
            direction(now, offset(p, t), (int64_t)o * (n + 1), at->gradient);
        }
        descend(now, t, at->gradient);
    }
}

/* S of a layer: s[b][o], η Σ_j m_oj x̄_j², or for M = I one s[b] for all outputs. Returns its stride over o. */
static int contraction(const stepping *now, int t) {
    const program *p = now->p;
    memory *at = now->at;
    const int n = p->widths[t], o = p->widths[t + 1], batch = p->batch;
    const vec rate = now->blk->rates[RATE], *x = at->x[t];
    if (p->preconditioner == IDENTITY_M) {
        for (int b = 0; b < batch; b++) {
            vec sum = splat(0);
            for (int i = 0; i < n; i++) sum += x[b * n + i] * x[b * n + i];
            at->s[b] = rate + rate * sum;
        }
        return 0;
    }
    multiply((int64_t)batch * n, x, x, at->square);
    const vec *m = at->inverse[t];
    product(batch, o, n, as(at->square, n, 1), as(m, 1, n + 1), as(m + n, 0, n + 1), at->s, o, 1, 0);
    for (int64_t j = 0; j < (int64_t)batch * o; j++) at->s[j] *= rate;
    return 1;
}

/* a = g_u Q_uu⁻¹ λu·w: a[b][o]. */
static void decay_response(const stepping *now, int t) {
    const program *p = now->p;
    memory *at = now->at;
    const int n = p->widths[t], o = p->widths[t + 1];
    const vec scale = now->blk->rates[RATE] * now->blk->rates[DECAY] * (real)p->share, *u = now->u + offset(p, t);
    vec *du = at->gradient;
    for (int64_t j = 0; j < (int64_t)o * (n + 1); j++) {
        du[j] = scale * u[j];
        if (p->preconditioner != IDENTITY_M) du[j] *= at->inverse[t][j];
    }
    affine(p->batch, n, o, at->x[t], du, at->a);
}

/* Prop. 3 at one layer: V and z before it, from V_h, z_h and w: ddpnopt/ddp/outer_product.py. */
static void outer_product_value(const stepping *now, int t, vec *w_before) {
    const program *p = now->p;
    memory *at = now->at;
    const int n = p->widths[t], o = p->widths[t + 1], batch = p->batch;
    const vec *u = now->u + offset(p, t);
    const int stride = contraction(now, t);
    if (p->has_decay) decay_response(now, t);
    pull_back(batch, n, o, at->V_h[t], u, at->V);
    pull_back(batch, n, o, at->z_h[t], u, at->z);
    for (int b = 0; b < batch; b++) {
        const vec *V_h = at->V_h[t] + b * o, *z_h = at->z_h[t] + b * o;
        vec c = splat(0), overlap = splat(0), more = splat(0), w = at->w[t][b], shrink;
        for (int a = 0; a < o; a++) {
            vec weighted = (stride ? at->s[b * o + a] : at->s[b]) * z_h[a];
            c += weighted * z_h[a];
            overlap += weighted * V_h[a];
            if (p->has_decay) more += z_h[a] * at->a[b * o + a];
        }
        if (p->has_decay) overlap += more;
        c *= w;
        if (p->psd) {
            w_before[b] = w / ((real)1 + c);
            shrink = overlap * w_before[b];
        } else {
            vec left = w - w * c;
            w_before[b] = choose(left < splat(0), splat(0), left);
            shrink = overlap * w;
        }
        for (int i = 0; i < n; i++) at->V[b * n + i] -= at->z[b * n + i] * shrink;
    }
}

/* X = (I + S V_hh)⁻¹ W and, with decay, (I + S V_hh)⁻¹ a in column n: by elimination without pivots, since
 * I + S V_hh is similar to a matrix above I. */
static void psd_closed_loop(memory *at, int n, int o, const vec *u, const vec *s, int stride,
                            const vec *a) {
    const int width = n + (a != 0);
    vec *system = at->system, *right = at->right;
    for (int r = 0; r < o; r++) {
        const vec scale = s[stride ? r : 0];
        for (int c = 0; c < o; c++) {
            system[r * o + c] = scale * at->V_hh[r * o + c];
            if (r == c) system[r * o + c] += (real)1;
        }
        for (int i = 0; i < n; i++) right[r * width + i] = u[r * (n + 1) + i];
        if (a) right[r * width + n] = a[r];
    }
    for (int k = 0; k < o; k++) {
        const vec pivot = (real)1 / system[k * o + k];
        for (int r = k + 1; r < o; r++) {
            const vec factor = system[r * o + k] * pivot;
            for (int c = k + 1; c < o; c++) system[r * o + c] -= factor * system[k * o + c];
            for (int i = 0; i < width; i++) right[r * width + i] -= factor * right[k * width + i];
        }
    }
    for (int k = o - 1; k >= 0; k--) {
        const vec pivot = (real)1 / system[k * o + k];
        for (int i = 0; i < width; i++) {
            vec sum = right[k * width + i];
            for (int c = k + 1; c < o; c++) sum -= system[k * o + c] * right[c * width + i];
            right[k * width + i] = sum * pivot;
        }
    }
    for (int r = 0; r < o; r++)
        for (int i = 0; i < n; i++) at->X[r * n + i] = right[r * width + i];
}

/* V_x and V_xx + εI before a layer by the closed loop X: ddpnopt/ddp/backward.py. */
static void full_value(const stepping *now, int t) {
    const program *p = now->p;
    memory *at = now->at;
    const int n = p->widths[t], o = p->widths[t + 1], kind = act(p, t);
    const vec *u = now->u + offset(p, t), reg = now->blk->rates[REG];
    const int stride = contraction(now, t);
    if (p->has_decay) decay_response(now, t);
    const int64_t value = widest_value(p);
    for (int b = 0; b < p->batch; b++) {
        vec *V_xx = at->V_xx + b * value * value, *V_hh = V_xx, *A = at->A[t] + (int64_t)b * o * n, *X = at->X;
        const vec *slope = at->slope[t] + b * o, *s = at->s + (stride ? b * o : b), *V_h = at->V_h[t] + b * o;
        vec *a = p->has_decay ? at->a + b * o : 0;
        if (kind != IDENTITY) {
            V_hh = at->V_hh;
            for (int r = 0; r < o; r++)
                for (int c = 0; c < o; c++) V_hh[r * o + c] = slope[r] * V_xx[r * o + c] * slope[c];
        } else if (p->psd) {
            memcpy(at->V_hh, V_xx, (size_t)o * o * sizeof(vec));
            V_hh = at->V_hh;
        }
        product(o, n, o, as(V_hh, o, 1), as(u, n + 1, 1), NOTHING, A, n, 1, 0);
        if (p->psd) {
            psd_closed_loop(at, n, o, u, s, stride, a);
            if (a)
                for (int r = 0; r < o; r++) a[r] = at->right[r * (n + 1) + n];
        } else
            for (int r = 0; r < o; r++)
                for (int i = 0; i < n; i++) X[r * n + i] = u[r * (n + 1) + i] - s[stride ? r : 0] * A[r * n + i];
        vec *V = at->V + b * n;
        for (int i = 0; i < n; i++) {
            vec sum = splat(0), less = splat(0);
            for (int r = 0; r < o; r++) sum += X[r * n + i] * V_h[r];
            if (a) {
                for (int r = 0; r < o; r++) less += A[r * n + i] * a[r];
                sum -= less;
            }
            V[i] = sum;
        }
        /* Xᵀ A is symmetric: half of it is computed. */
        product(n, n, o, as(X, 1, n), as(A, n, 1), NOTHING, V_xx, n, 1, 1);
        for (int r = 0; r < n; r++)
            for (int c = r + 1; c < n; c++) V_xx[r * n + c] = V_xx[c * n + r];
        if (p->has_reg)
            for (int i = 0; i < n; i++) V_xx[i * n + i] += reg;
    }
}

/* V_xx at T: κ times the exact Hessian on the scale of the units, or the outer product of V_x. */
static void terminal_hessian(const stepping *now) {
    const program *p = now->p;
    memory *at = now->at;
    const int classes = p->widths[p->layers];
    const int64_t value = widest_value(p);
    const vec scale = now->blk->rates[SCALE];
    const real square = (real)(p->share * p->share);
    for (int b = 0; b < p->batch; b++) {
        vec *V_xx = at->V_xx + b * value * value;
        const vec *V = at->V + b * classes;
        /* ∇φ of cross-entropy is p less one at the label. */
        vec prob[classes];
        if (p->exact_hessian && p->loss == CROSS_ENTROPY)
            for (int c = 0; c < classes; c++) {
                vec here;
                for (int l = 0; l < LANES; l++) here[l] = at->label[b * LANES + l] == c ? (real)1 : (real)0;
                prob[c] = at->z[b * classes + c] + here;
            }
        for (int r = 0; r < classes; r++)
            for (int c = 0; c < classes; c++) {
                vec entry;
                if (!p->exact_hessian)
                    entry = V[r] * V[c];
                else if (p->loss == CROSS_ENTROPY)
                    entry = ((r == c ? prob[r] : splat(0)) - prob[r] * prob[c]) * square;
                else
                    entry = splat(r == c ? (p->loss == MSE ? square : 2 * square) : 0);
                V_xx[r * classes + c] = scale * entry;
            }
    }
}

static void backward(stepping *now) {
    const program *p = now->p;
    memory *at = now->at;
    const int classes = p->widths[p->layers], outer = p->form == OUTER_PRODUCT;
    if (outer) {
        memcpy(at->z, at->V, (size_t)p->batch * classes * sizeof(vec));
        for (int b = 0; b < p->batch; b++) at->w[p->layers - 1][b] = now->blk->rates[SCALE];
    } else if (p->form == FULL)
        terminal_hessian(now);
    for (int t = p->layers - 1; t >= 0; t--) {
        through_sigma(p, t, at, at->V, at->V_h[t]);
        if (p->preconditioner != IDENTITY_M) learn(now, t);
        if (t == 0) break;
        if (outer) {
            through_sigma(p, t, at, at->z, at->z_h[t]);
            outer_product_value(now, t, at->w[t - 1]);
        } else if (p->form == FULL)
            full_value(now, t);
        else
            pull_back(p->batch, p->widths[t], p->widths[t + 1], at->V_h[t], now->u + offset(p, t), at->V);
    }
}

/* V_h + A δx in the place of V_h. */
static void closed_loop(const stepping *now, int t) {
    const program *p = now->p;
    memory *at = now->at;
    const int n = p->widths[t], o = p->widths[t + 1], last = t == p->layers - 1;
    if (p->form == FULL) {
        for (int b = 0; b < p->batch; b++)
            product(1, o, n, as(at->dx + b * n, n, 1), as(at->A[t] + (int64_t)b * o * n, 1, n),
                    as(at->V_h[t] + b * o, o, 1), at->V_h[t] + b * o, o, 1, 0);
        return;
    }
    push_forward(p->batch, n, o, at->dx, now->u + offset(p, t), at->dh);
    const vec reg = now->blk->rates[REG];
    for (int b = 0; b < p->batch; b++) {
        vec overlap = splat(0), *V_h = at->V_h[t] + b * o;
        const vec *z_h = at->z_h[t] + b * o, *dh = at->dh + b * o, *slope = at->slope[t] + b * o;
        for (int a = 0; a < o; a++) overlap += z_h[a] * dh[a];
        overlap *= at->w[t][b];
        for (int a = 0; a < o; a++) {
            vec response = V_h[a] + z_h[a] * overlap;
            if (p->has_reg && !last) {
                vec damping = act(p, t) == IDENTITY ? dh[a] : slope[a] * (slope[a] * dh[a]);
                response += damping * reg;
            }
            V_h[a] = response;
        }
    }
}

/* The second forward pass: ddpnopt/ddp/forward.py. x̂ takes the place of Q and q in turn. */
static void apply_policy(stepping *now) {
    const program *p = now->p;
    memory *at = now->at;
    vec *x_hat = at->x[0];
    for (int t = 0; t < p->layers; t++) {
        const int n = p->widths[t], o = p->widths[t + 1], kind = act(p, t);
        if (t > 0 && p->form != OPEN_LOOP) {
            for (int64_t j = 0; j < (int64_t)p->batch * n; j++) at->dx[j] = x_hat[j] - at->x[t][j];
            closed_loop(now, t);
        }
        outer_sum(p->batch, n, o, at->V_h[t], at->x[t], at->gradient);
        direction(now, offset(p, t), (int64_t)o * (n + 1), at->gradient);
        descend(now, t, at->gradient);
        if (t == p->layers - 1 || p->form == OPEN_LOOP) continue;
        vec *after = x_hat == at->Q ? at->q : at->Q;
        affine(p->batch, n, o, x_hat, now->next + offset(p, t), after);
        if (kind != IDENTITY)
            for (int64_t j = 0; j < (int64_t)p->batch * o; j++) after[j] = activate(kind, after[j]);
        x_hat = after;
    }
}

/* Mean loss of the batch and V_x at T. */
static void terminal(stepping *now) {
    const program *p = now->p;
    memory *at = now->at;
    const int classes = p->widths[p->layers];
    vec sum = splat(0), right = splat(0);
    for (int b = 0; b < p->batch; b++) {
        const int64_t *label = at->label + b * LANES;
        const vec *y = at->x[p->layers] + b * classes;
        vec *gradient = at->z + b * classes, *V = at->V + b * classes;
        memcpy(gradient, y, (size_t)classes * sizeof(vec));
        right += right_of(y, classes, label);
        sum += loss_of(p, gradient, label, 1);
        for (int c = 0; c < classes; c++) V[c] = gradient[c] * (real)p->share;
    }
    *now->blk->loss = sum / (real)p->batch;
    for (int l = 0; l < LANES; l++) {
        now->blk->running[l] += (double)(*now->blk->loss)[l];
        now->blk->running[LANES + l] += (double)right[l];
    }
}

static ivec not_finite(vec x) { return ~((x - x) == splat(0)); }

static int any(ivec mask) {
    whole found = 0;
    for (int l = 0; l < LANES; l++) found |= mask[l];
    return found != 0;
}

/* Do updates number `first` to `last` (from 1) of a block, or fewer: a lane that leaves the finite numbers ends the
 * call after its step, with the state before that step still in the other copy.
 *
 * inputs [N][n_0] and targets [N]; rows [seeds][..][batch] begin at update `first`, `per_seed` numbers a seed.
 * Returns the updates done. */
int64_t train(const program *p, block *blk, vec *space, const real *inputs, const int64_t *targets,
              const int64_t *rows, int64_t per_seed, int64_t first, int64_t last) {
    memory at;
    lay_out(p, &at, space);
    *blk->bad_loss = *blk->bad_controls = (ivec){0};
    for (int64_t step = first; step <= last; step++) {
        const int64_t old = blk->current;
        stepping now = {p, blk, &at, blk->u[old], blk->u[1 - old], step, splat(0)};
        *blk->last_loss = *blk->loss;
        gather(p, blk, &at, inputs, targets, rows + (step - first) * p->batch, per_seed);
        forward(&now);
        terminal(&now);
        if (p->baseline)
            baseline_step(&now);
        else {
            backward(&now);
            apply_policy(&now);
        }
        blk->current = 1 - old;
        *blk->bad_loss = *blk->alive & not_finite(*blk->loss);
        *blk->bad_controls = *blk->alive & ~*blk->bad_loss & not_finite(now.finite);
        if (any(*blk->bad_loss | *blk->bad_controls)) return step - first + 1;
    }
    return last - first + 1;
}

/* Measure a block's nets u on a whole set: sums of the losses and counts of right answers, each [LANES]. */
void evaluate(const program *p, const vec *u, vec *space, const real *inputs, const int64_t *targets,
              int64_t count, double *loss, double *right) {
    const int n = p->widths[0], classes = p->widths[p->layers];
    memset(loss, 0, LANES * sizeof(double));
    memset(right, 0, LANES * sizeof(double));
    for (int64_t start = 0; start < count; start += SAMPLES) {
        const int many = count - start < SAMPLES ? (int)(count - start) : SAMPLES;
        vec *x = space, *y = space + SAMPLES * widest(p);
        for (int64_t j = 0; j < (int64_t)many * n; j++) x[j] = splat(inputs[start * n + j]);
        const vec *layer = u;
        for (int t = 0; t < p->layers; t++) {
            const int i = p->widths[t], o = p->widths[t + 1], kind = act(p, t);
            affine(many, i, o, x, layer, y);
            if (kind != IDENTITY)
                for (int64_t j = 0; j < (int64_t)many * o; j++) y[j] = activate(kind, y[j]);
            layer += (int64_t)o * (i + 1);
            vec *swap = x;
            x = y;
            y = swap;
        }
        for (int b = 0; b < many; b++) {
            int64_t label[LANES];
            for (int l = 0; l < LANES; l++) label[l] = targets[start + b];
            vec hit = right_of(x + b * classes, classes, label);
            vec cost = loss_of(p, x + b * classes, label, 0);
            for (int l = 0; l < LANES; l++) {
                loss[l] += (double)cost[l];
                right[l] += (double)hit[l];
            }
        }
    }
}

/* --- eigenvectors of small symmetric matrices --- */

#ifdef DOUBLE
#define UNIT_ROUNDOFF 1.1102230246251565e-16
#else
#define UNIT_ROUNDOFF 5.9604644775390625e-08f
#endif
#define MOST_SWEEPS 30

/* Rotate p and q so that a_pq becomes zero (Golub & Van Loan, Matrix Computations, section 8.5), in the lanes where it
 * is not below rounding; the numbers of the others stay as they are. Returns whether there was one. */
INLINE int rotate(int n, int row, vec *a, vec *v, int p, int q) {
    const vec zero = splat(0), app = a[p * row + p], aqq = a[q * row + q], apq = a[p * row + q];
    const vec both = app * aqq, limit = choose(both < zero, -both, both) * (real)(UNIT_ROUNDOFF * UNIT_ROUNDOFF);
    const ivec needed = apq * apq > limit;
    if (!any(needed)) return 0;
    const vec theta = (aqq - app) / (apq + apq);
    vec t = (real)1 / (choose(theta < zero, -theta, theta) + vsqrt(theta * theta + (real)1));
    t = choose(theta < zero, -t, t);
    t = choose(needed, t, zero);
    const vec c = (real)1 / vsqrt(t * t + (real)1), s = t * c;
    for (int k = 0; k < n; k++) {
        const vec left = a[p * row + k], right = a[q * row + k];
        a[p * row + k] = a[k * row + p] = c * left - s * right;
        a[q * row + k] = a[k * row + q] = s * left + c * right;
        const vec v_left = v[p * row + k], v_right = v[q * row + k];
        v[p * row + k] = c * v_left - s * v_right;
        v[q * row + k] = s * v_left + c * v_right;
    }
    a[p * row + p] = app - t * apq;
    a[q * row + q] = aqq + t * apq;
    a[p * row + q] = a[q * row + p] = choose(needed, zero, apq);
    return 1;
}

/* Eigenvectors of a block's matrices a[n][row], which are overwritten, as the rows of v[n][row], and their values[n],
 * in no order: cyclic Jacobi, until a sweep finds nothing to rotate. An odd `row` of at least n keeps the
 * columns from falling into the same sets of the cache. */
void eigh(int32_t n, int32_t row, vec *a, vec *v, vec *values) {
    vec most = splat(0);
    for (int p = 0; p < n; p++)
        for (int k = 0; k < n; k++)
            most = vmax(choose(a[p * row + k] < splat(0), -a[p * row + k], a[p * row + k]), most);
    const vec scale = choose(most > splat(0), most, splat(1));
    for (int p = 0; p < n; p++)
        for (int k = 0; k < n; k++) {
            a[p * row + k] /= scale;
            v[p * row + k] = splat(p == k);
        }
    int rotations = 1;
    for (int sweep = 0; rotations && sweep < MOST_SWEEPS; sweep++) {
        rotations = 0;
        for (int p = 0; p < n; p++)
            for (int q = p + 1; q < n; q++) rotations += rotate(n, row, a, v, p, q);
    }
    for (int p = 0; p < n; p++) values[p] = a[p * row + p] * scale;
}
