/* Boxes of encoded JPEGs, resized to size² RGB images: a batch in one call, without Python's lock.

   Of each image only the rows and columns that the box needs are decoded, at the smallest DCT scale (1/8, 1/4, 1/2, 1)
   at which the box still has `size` pixels each way, with libjpeg-turbo's accurate IDCT and smooth chroma upsampling;
   they are resized as they come, with a triangle filter, its vertical pass first, in float32. The pixels are those of
   recipe/data/decode.py's NumPy code to the bit: each operation is rounded by itself (-ffp-contract=off). */

#include <math.h>
#include <setjmp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <jpeglib.h>
#include <jerror.h>

#if defined(__x86_64__) && defined(__gnu_linux__) && defined(__GNUC__)
#define CLONES __attribute__((target_clones("avx512f", "avx2", "default"))) /* chosen when the library is loaded */
#else
#define CLONES
#endif

enum { PLAIN, BILINEAR, SMOOTH }; /* kinds of filter: none, the box as it is; without and with a low-pass */
enum { MARGIN = 2 };              /* pixels beside the box that the chroma at its edges depends on */

typedef float pixel __attribute__((vector_size(16), aligned(4))); /* R, G, B and something else */
typedef float pair __attribute__((vector_size(32), aligned(16)));
typedef int integers __attribute__((vector_size(32)));
typedef unsigned char bytes __attribute__((vector_size(32)));

#if defined(__clang__) || __GNUC__ >= 12
#define JOINED(a, b) __builtin_shufflevector(a, b, 0, 1, 2, 3, 4, 5, 6, 7)
#define PACKED(v) /* bytes 0, 4, 8 and 12 of each half come first in it */                                             \
    __builtin_shufflevector(v, v, 0, 4, 8, 12, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 16, 20, 24, 28, 16, 16, 16, 16, 16, \
                            16, 16, 16, 16, 16, 16, 16)
#else /* older GCC; 4 % slower */
#define JOINED(a, b) ((pair){a[0], a[1], a[2], a[3], b[0], b[1], b[2], b[3]})
#define PACKED(v)                                                                                                      \
    __builtin_shuffle(v, (bytes){0,  4,  8,  12, 0,  0,  0,  0,  0,  0,  0,  0,  0,  0,  0,  0,                         \
                                 16, 20, 24, 28, 16, 16, 16, 16, 16, 16, 16, 16, 16, 16, 16, 16})
#endif

typedef struct { /* how one side of the box becomes one side of the image */
    int low, high;  /* the source's pixels that are read */
    int taps;       /* so many of them make a pixel of the image, */
    int *first;     /* [size] from this one on, counted from low, */
    float *weights; /* [size][taps] with these weights, zeros among them */
} axis;

typedef struct {
    struct jpeg_decompress_struct jpeg; /* first, so that libjpeg's callbacks find the rest */
    struct jpeg_error_mgr errors;
    jmp_buf failed;
    char *message;
    const unsigned char *raw; /* instead of a JPEG: the next row of RGB pixels */
    int stride;               /* of the source's rows, in bytes */
    int skipped;              /* bytes of a row before the box's columns */
    axis rows, columns;
    void *scratch;
    size_t room;
} job;

static void fail(j_common_ptr common)
{
    job *j = (job *)common;
    j->errors.format_message(common, j->message);
    longjmp(j->failed, 1);
}

static void refuse(job *j, const char *reason)
{
    snprintf(j->message, JMSG_LENGTH_MAX, "%s", reason);
    longjmp(j->failed, 1);
}

/* Warnings go unheard, as in other decoders, but for those that stand for missing pixels. */
static void warn(j_common_ptr common, int level)
{
    int code = common->err->msg_code;
    if (level < 0 && (code == JWRN_JPEG_EOF || code == JWRN_HIT_MARKER))
        fail(common);
}

static int least(int a, int b) { return a < b ? a : b; }
static int most(int a, int b) { return a > b ? a : b; }

/* Which of a side's `length` pixels are read, for a box of this beginning and extent. */
static void bound(axis *a, double begin, double extent, int length, int size, int filter)
{
    double reach = filter == SMOOTH ? fmax(extent / size, 1) : 0;
    a->low = most((int)floor(begin - reach), 0);
    a->high = least((int)ceil(begin + extent + reach), length);
    a->taps = (int)ceil(2 * fmax(reach, 1));
}

/* The weights. A pixel's filter ends where the pixels do, and is then the larger inside. */
CLONES static void weigh(axis *a, double begin, double extent, int size, int filter, int mirrored)
{
    double step = extent / size, reach = filter == SMOOTH && step > 1 ? step : 1;
    for (int i = 0; i < size; i++) {
        double centre = begin + (i + 0.5) * step, sum = 0;
        int first = most((int)floor(centre - reach + 0.5), a->low), place = mirrored ? size - 1 - i : i;
        int last = least(first + a->taps, a->high);
        float *weights = a->weights + (size_t)place * a->taps;
        for (int pass = 0; pass < 2; pass++)
            for (int k = 0; k < a->taps; k++) {
                double distance = fabs(first + k + 0.5 - centre) / reach;
                double weight = first + k < last && distance < 1 ? 1 - distance : 0;
                if (pass)
                    weights[k] = (float)(weight / sum);
                else
                    sum += weight;
            }
        a->first[place] = first - a->low;
    }
}

/* line[j] = Σ weights[k] · rows[k][j] */
CLONES static void blend(float *restrict line, unsigned char *const *rows, const float *weights, int taps, int count)
{
    const unsigned char *restrict a = rows[0], *restrict b = rows[1];
    float u = weights[0], v = weights[1];
    for (int j = 0; j < count; j++)
        line[j] = u * a[j] + v * b[j];
    for (int k = 2; k < taps; k++) {
        const unsigned char *restrict c = rows[k];
        float w = weights[k];
        for (int j = 0; j < count; j++)
            line[j] += w * c[j];
    }
}

/* Two neighbouring pixels of the image, in the bytes 0 to 3 and 16 to 19. */
static inline __attribute__((always_inline)) integers weighed(const float *a, const float *b, const pixel *weights,
                                                              int taps, int stride)
{
    pair sum = {0};
    for (int k = 0; k < taps; k++) {
        pixel one = *(const pixel *)(a + 3 * k), other = *(const pixel *)(b + 3 * k);
        pair both = JOINED(one, other) * *(const pair *)(weights + k * stride);
        sum = k ? sum + both : both;
    }
    bytes whole = (bytes)__builtin_convertvector(sum + 0.5f, integers);
    return (integers)PACKED(whole);
}

/* One row of the image from a blended row of the source. */
CLONES static void narrow(unsigned char *out, const float *line, const int *first, const pixel *weights, int taps,
                          int size)
{
    int i = 0, one, other;
    for (; i + 2 < size; i += 2) {
        const float *a = line + 3 * first[i], *b = line + 3 * first[i + 1];
        integers found;
        if (taps == 2)
            found = weighed(a, b, weights + i, 2, size + 1);
        else
            found = weighed(a, b, weights + i, taps, size + 1);
        one = found[0], other = found[4];
        memcpy(out + 3 * i, &one, 4); /* with padding, which the next pixel covers */
        memcpy(out + 3 * i + 3, &other, 4);
    }
    integers found = weighed(line + 3 * first[i], line + 3 * first[i + 1], weights + i, taps, size + 1);
    one = found[0], other = found[4];
    memcpy(out + 3 * i, &one, 3);
    if (i + 1 < size)
        memcpy(out + 3 * i + 3, &other, 3);
}

/* The next row of the source. */
static void read_row(job *j, unsigned char *row)
{
    if (j->raw) {
        memcpy(row, j->raw, j->stride);
        j->raw += j->stride;
        return;
    }
    jpeg_read_scanlines(&j->jpeg, &row, 1);
    if (j->jpeg.out_color_space == JCS_CMYK) /* inverted, as Adobe writes it; multiplied as Pillow does */
        for (unsigned char *from = row, *end = row + j->stride, *to = row; from < end; from += 4)
            for (int c = 0, k = from[3]; c < 3; c++) {
                int product = (255 - from[c]) * k + 128;
                *to++ = k - ((product + (product >> 8)) >> 8);
            }
}

/* Memory for a job: `count` bytes, each part of it aligned. */
static void *reserve(job *j, size_t count)
{
    if (count > j->room) {
        free(j->scratch);
        j->room = 0;
        if (!(j->scratch = aligned_alloc(64, count)))
            refuse(j, "no memory is left");
        j->room = count;
    }
    return j->scratch;
}

static size_t padded(size_t count) { return (count + 63) & ~(size_t)63; }

/* Reads the box's rows and writes the image; only the rows that a row of the image needs are kept. */
static void sweep(job *j, const double *box, int mirrored, int size, int filter, unsigned char *out)
{
    axis *v = &j->rows, *h = &j->columns;
    int width = h->high - h->low, slots = least(v->taps, v->high - v->low), taken = 0;
    size_t row = padded(j->stride), line = padded(sizeof(float) * (3 * (width + h->taps) + 1));
    size_t firsts = padded(sizeof(int) * (size + 1)), weights[2] = {padded(sizeof(float) * size * v->taps),
                                                                     padded(sizeof(float) * size * h->taps)};
    size_t spread = padded(sizeof(pixel) * (size + 1) * h->taps);
    size_t pointers = padded(sizeof(void *) * v->taps);
    unsigned char *at = reserve(j, slots * row + line + 2 * firsts + weights[0] + weights[1] + pointers + spread);
    unsigned char *ring = at, **rows = (unsigned char **)(at += slots * row);
    float *blended = (float *)(at += pointers);
    pixel *across;
    v->first = (int *)(at += line), h->first = (int *)(at += firsts);
    v->weights = (float *)(at += firsts), h->weights = (float *)(at += weights[0]), across = (pixel *)(at + weights[1]);
    if (filter == PLAIN) {
        while (taken++ < v->high - v->low)
            read_row(j, ring);
        return;
    }
    weigh(v, box[0], box[2], size, filter, 0);
    weigh(h, box[1], box[3], size, filter, mirrored);
    memset(blended + 3 * width, 0, sizeof(float) * (3 * h->taps + 1)); /* read, with weight zero */
    h->first[size] = 0;
    for (int k = 0; k < h->taps; k++) /* for each tap all pixels' weights, and those of one more, if size is odd */
        for (int i = 0; i <= size; i++) {
            float w = i < size ? h->weights[i * h->taps + k] : 0;
            across[(size_t)k * (size + 1) + i] = (pixel){w, w, w, w};
        }
    for (int i = 0; i < size; i++) {
        int last = v->high - v->low - 1;
        while (taken <= least(v->first[i] + v->taps - 1, last))
            read_row(j, ring + (taken++ % slots) * row);
        for (int k = 0; k < v->taps; k++)
            rows[k] = ring + (least(v->first[i] + k, last) % slots) * row + j->skipped;
        blend(blended, rows, v->weights + (size_t)i * v->taps, v->taps, 3 * width);
        narrow(out + (size_t)3 * size * i, blended, h->first, across, h->taps, size);
    }
}

/* Whether libjpeg smooths the blocks, of a progressive image whose last scans are missing: across some blocks. */
static int smoothed(const struct jpeg_decompress_struct *c)
{
    int missing = 0;
    for (int i = 0; c->progressive_mode && i < c->num_components; i++)
        for (int k = 0; k < DCTSIZE2; k++)
            missing |= c->coef_bits[i][k];
    return missing != 0;
}

/* Sets the decoder to the box's first row, at its scale; `box` is then in scaled pixels. */
static void open_jpeg(job *j, const unsigned char *data, size_t length, double *box, int size, int filter)
{
    struct jpeg_decompress_struct *c = &j->jpeg;
    memset(c->quant_tbl_ptrs, 0, sizeof c->quant_tbl_ptrs); /* else an image without tables takes another image's */
    memset(c->dc_huff_tbl_ptrs, 0, sizeof c->dc_huff_tbl_ptrs);
    memset(c->ac_huff_tbl_ptrs, 0, sizeof c->ac_huff_tbl_ptrs);
    jpeg_mem_src(c, (unsigned char *)data, length);
    jpeg_read_header(c, TRUE);
    if (!(box[0] >= 0 && box[1] >= 0 && box[2] > 0 && box[3] > 0 && box[0] + box[2] <= c->image_height + 1e-3 &&
          box[1] + box[3] <= c->image_width + 1e-3))
        refuse(j, "the box is not inside the image");
    c->out_color_space = c->num_components == 4 ? JCS_CMYK : JCS_RGB;
    c->scale_num = 1; /* halves only: the scales between have no vector code, and cost 8 % on ImageNet's sizes */
    c->scale_denom = filter == SMOOTH ? 1 : 8;
    while (c->scale_denom > 1 && fmin(box[2], box[3]) < (double)size * c->scale_denom)
        c->scale_denom /= 2;
    jpeg_start_decompress(c);
    for (int side = 0; side < 4; side++)
        box[side] /= c->scale_denom;
    bound(&j->rows, box[0], box[2], c->output_height, size, filter);
    bound(&j->columns, box[1], box[3], c->output_width, size, filter);
    if (j->rows.low >= j->rows.high || j->columns.low >= j->columns.high)
        refuse(j, "the box is not inside the image");
    int margin = filter == PLAIN ? 0 : smoothed(c) ? JPEG_MAX_DIMENSION : MARGIN;
    int top = most(j->rows.low - margin, 0);
    JDIMENSION left = most(j->columns.low - margin, 0);
    JDIMENSION width = least(j->columns.high + margin, c->output_width) - left;
    if (width < c->output_width)
        jpeg_crop_scanline(c, &left, &width);
    else
        left = 0;
    j->stride = c->output_width * c->output_components;
    j->skipped = 3 * (j->columns.low - (int)left);
    if (top)
        jpeg_skip_scanlines(c, top);
    unsigned char *row = reserve(j, padded(j->stride));
    for (int y = top; y < j->rows.low; y++)
        jpeg_read_scanlines(c, &row, 1);
}

/* Decodes, crops, resizes and mirrors `count` JPEGs.

   data, sizes: each one's bytes and their number. boxes[count][4]: y, x, height, width in its pixels. out: uint8
   [count][size][size][3]. messages[count][JMSG_LENGTH_MAX], zeros: what is wrong with an image, whose pixels are then
   undefined. Returns how many of them failed, or -1 without memory. */
int recipe_decode(int count, const unsigned char *const *data, const size_t *sizes, const double *boxes,
                  const unsigned char *mirrored, int size, int filter, unsigned char *out, char *messages)
{
    job *j = calloc(1, sizeof(job));
    volatile int failures = 0, i = 0;
    char problem[JMSG_LENGTH_MAX];
    if (!j)
        return -1;
    j->jpeg.err = jpeg_std_error(&j->errors);
    j->errors.error_exit = fail;
    j->errors.emit_message = warn;
    j->message = problem;
    if (setjmp(j->failed)) {
        if (!j->jpeg.mem) { /* libjpeg itself can't begin */
            free(j);
            return -1;
        }
        snprintf(messages + (size_t)i * JMSG_LENGTH_MAX, JMSG_LENGTH_MAX, "%s", problem);
        failures++, i++;
        jpeg_abort_decompress(&j->jpeg);
    } else {
        jpeg_create_decompress(&j->jpeg);
        j->jpeg.mem->max_memory_to_use = 2L << 30; /* a progressive image wants all of its coefficients at once */
    }
    for (; i < count; i++) {
        double box[4];
        memcpy(box, boxes + (size_t)4 * i, sizeof box);
        open_jpeg(j, data[i], sizes[i], box, size, filter);
        sweep(j, box, mirrored[i], size, filter, out + (size_t)3 * size * size * i);
        jpeg_abort_decompress(&j->jpeg);
    }
    jpeg_destroy_decompress(&j->jpeg);
    free(j->scratch);
    free(j);
    return failures;
}

/* The same of one image of decoded pixels, uint8[height][width][3]. Returns 0, or -1 without memory. */
int recipe_resize(const unsigned char *pixels, int height, int width, const double *box, int mirrored, int size,
                  int filter, unsigned char *out)
{
    char problem[JMSG_LENGTH_MAX];
    job *j = calloc(1, sizeof(job));
    int failed = !j;
    if (j) {
        j->message = problem;
        bound(&j->rows, box[0], box[2], height, size, filter);
        bound(&j->columns, box[1], box[3], width, size, filter);
        j->stride = 3 * width;
        j->skipped = 3 * j->columns.low;
        j->raw = pixels + (size_t)j->rows.low * j->stride;
        if (setjmp(j->failed))
            failed = 1;
        else
            sweep(j, box, mirrored, size, filter, out);
        free(j->scratch);
        free(j);
    }
    return -failed;
}
