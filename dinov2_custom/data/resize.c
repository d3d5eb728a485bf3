/* Cut crops out of one image and resize them: bicubic, antialiased, the whole numbers of Pillow's Image.resize.
 *
 * Compiled at run time, as colours.c is. Rows are taken 16 at a time and turned on their side, so
 * that a vector holds one column of them; all crops share that. Each is first resized across, its levels rounded, then
 * down. Weights are rounded to 1 / 2^22. Read cut_crops, the last function, first.
 */
#include <math.h>
#include <stdint.h>
#include <string.h>
#if defined(__AVX512F__)
#include <immintrin.h>
enum { PARTS = 1 };
#elif defined(__AVX2__)
#include <immintrin.h>
enum { PARTS = 2 };
#else
enum { PARTS = 4 };
#endif
enum { LANES = 16, PART = LANES / PARTS, BITS = 22, ALIGNED = 64, TOGETHER = 3 };

typedef uint8_t bytes __attribute__((vector_size(LANES)));
typedef uint8_t anywhere __attribute__((vector_size(LANES), aligned(1)));
typedef int32_t words __attribute__((vector_size(4 * PART))); /* PARTS of them for LANES numbers */

/* What of the source makes target number i: number[i] levels from first[i] on, with the weights at table + i * most.
 * exact: room for those of one target before they are rounded. */
typedef struct {
    int *first, *number;
    int32_t *table;
    double *exact;
    int most;
} Weights;

typedef struct {
    int left, top, width, height, size, flip;
    long pitch; /* of a row of thin: 3 * size and what fills its last vector */
    Weights across, down;
    uint8_t *thin; /* (height, pitch): resized across, not yet down */
} Crop;

static double cubic(double x)
{
    x = fabs(x);
    return x < 1 ? (1.5 * x - 2.5) * x * x + 1 : x < 2 ? ((-0.5 * x + 2.5) * x - 4) * x + 2 : 0;
}

static int most_weights(int length, int size)
{
    double scale = (double)length / size;
    return 2 * (int)ceil(2 * (scale > 1 ? scale : 1)) + 1;
}

static void weigh(Weights w, int length, int size, int flip)
{
    double scale = (double)length / size, wide = scale > 1 ? scale : 1;
    for (int i = 0; i < size; i++) {
        double centre = (i + 0.5) * scale, total = 0;
        int low = (int)(centre - 2 * wide + 0.5), high = (int)(centre + 2 * wide + 0.5);
        low = low < 0 ? 0 : low;
        high = high > length ? length : high;
        int target = flip ? size - 1 - i : i;
        int32_t *row = w.table + (long)target * w.most;
        for (int j = 0; j < high - low; j++)
            total += w.exact[j] = cubic((j + low - centre + 0.5) * (1 / wide));
        for (int j = 0; j < high - low; j++)
            row[j] = (int32_t)floor(w.exact[j] / total * (1 << BITS) + 0.5);
        w.first[target] = low, w.number[target] = high - low;
    }
}

/* Rows into columns: r[i][j] becomes r[j][i], in four rounds of interleaving. */
static inline void transpose(bytes *r)
{
#ifdef __clang__
#define MIX(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define MIX(a, b, ...) __builtin_shuffle(a, b, (bytes){__VA_ARGS__})
#endif
    bytes s[LANES];
    for (int round = 0; round < 4; round++) {
        const bytes *from = round % 2 ? s : r;
        bytes *to = round % 2 ? r : s;
        for (int i = 0; i < LANES / 2; i++) {
            to[2 * i] = MIX(from[i], from[i + 8], 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
            to[2 * i + 1] = MIX(from[i], from[i + 8], 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
        }
    }
}

/* tile: (width, 16): 16 rows of `width` levels on their side; where there are fewer, the last is repeated. */
static void turn_rows(const uint8_t *image, long stride, int width, int rows, bytes *tile)
{
    const uint8_t *row[LANES];
    for (int i = 0; i < LANES; i++)
        row[i] = image + (i < rows ? i : rows - 1) * stride;
    for (int x = 0; x < width; x += LANES) {
        bytes *r = tile + x;
        if (x + LANES <= width)
            for (int i = 0; i < LANES; i++)
                r[i] = *(const anywhere *)(row[i] + x);
        else
            for (int i = 0; i < LANES; i++)
                memcpy(r + i, row[i] + x, (size_t)(width - x));
        transpose(r);
    }
}

static inline words widened(const uint8_t *p)
{
#if defined(__AVX512F__)
    return (words)_mm512_cvtepu8_epi32(*(const __m128i *)p);
#elif defined(__AVX2__)
    return (words)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)p));
#else
    return (words){p[0], p[1], p[2], p[3]};
#endif
}

static inline void add(words *total, const bytes *levels, int32_t weight)
{
    for (int i = 0; i < PARTS; i++)
        total[i] += widened((const uint8_t *)levels + i * PART) * weight;
}

static inline uint8_t rounded(int32_t total)
{
    int32_t v = total >> BITS;
    return (uint8_t)(v < 0 ? 0 : v > 255 ? 255 : v);
}

static inline bytes all_rounded(const words *total)
{
#if defined(__AVX512F__)
    __m512i v = _mm512_max_epi32((__m512i)(*total >> BITS), _mm512_setzero_si512());
    return (bytes)_mm512_cvtusepi32_epi8(v);
#elif defined(__AVX2__)
    __m256i v = _mm256_packs_epi32((__m256i)(total[0] >> BITS), (__m256i)(total[1] >> BITS));
    v = _mm256_permute4x64_epi64(v, 0xd8);
    return (bytes)_mm_packus_epi16(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
#else
    uint8_t levels[LANES];
    for (int i = 0; i < LANES; i++)
        levels[i] = rounded(total[i / PART][i % PART]);
    return *(const anywhere *)levels;
#endif
}

/* Rows y..y+15 of the image, of which tile has the crop's columns, into those of `thin` that the crop has. */
static void resize_across(const Crop *crop, const bytes *tile, int y, bytes *turned)
{
    for (int x = 0; x < crop->size; x++) {
        const bytes *t = tile + 3 * crop->across.first[x];
        const int32_t *w = crop->across.table + (long)x * crop->across.most;
        words r[PARTS], g[PARTS], b[PARTS];
        for (int i = 0; i < PARTS; i++)
            r[i] = g[i] = b[i] = (words){0} + (1 << (BITS - 1));
        for (int j = 0, n = crop->across.number[x]; j < n; j++, t += 3)
            add(r, t, w[j]), add(g, t + 1, w[j]), add(b, t + 2, w[j]);
        turned[3 * x] = all_rounded(r), turned[3 * x + 1] = all_rounded(g), turned[3 * x + 2] = all_rounded(b);
    }
    int start = crop->top > y ? crop->top - y : 0, end = crop->top + crop->height - y;
    end = end < LANES ? end : LANES;
    for (int x = 0; x < 3 * crop->size; x += LANES) {
        transpose(turned + x);
        for (int i = start; i < end; i++)
            *(bytes *)(crop->thin + (y + i - crop->top) * crop->pitch + x) = turned[x + i];
    }
}

static void resize_down(const Crop *crop, uint8_t *out)
{
    int width = 3 * crop->size;
    for (int y = 0; y < crop->size; y++, out += width) {
        const int32_t *w = crop->down.table + (long)y * crop->down.most;
        const uint8_t *rows = crop->thin + crop->down.first[y] * crop->pitch;
        for (int x = 0; x < width; x += TOGETHER * LANES) {
            words total[TOGETHER][PARTS];
            for (int i = 0; i < TOGETHER * PARTS; i++)
                total[i / PARTS][i % PARTS] = (words){0} + (1 << (BITS - 1));
            const uint8_t *p = rows + x;
            for (int j = 0, n = crop->down.number[y]; j < n; j++, p += crop->pitch)
                for (int i = 0; i < TOGETHER; i++)
                    add(total[i], (const bytes *)p + i, w[j]);
            for (int i = 0, left = width - x; i < TOGETHER && left > 0; i++, left -= LANES) {
                bytes found = all_rounded(total[i]);
                memcpy(out + x + i * LANES, &found, left < LANES ? (size_t)left : LANES);
            }
        }
    }
}

static void *take(char **at, long size)
{
    char *start = *at;
    *at += (size + ALIGNED - 1) / ALIGNED * ALIGNED;
    return start;
}

static Weights take_weights(char **at, int length, int size)
{
    Weights w = {.most = most_weights(length, size)};
    w.first = take(at, 4L * size), w.number = take(at, 4L * size);
    w.table = take(at, 4L * size * w.most), w.exact = take(at, 8L * w.most);
    return w;
}

/* Share `scratch` out; return how much there must be, without touching it. */
static long lay_out(int crops, const int *numbers, Crop *all, bytes **tile, bytes **turned, char *scratch)
{
    char *at = scratch;
    int right = 0, size = 0;
    for (int i = 0; i < crops; i++, numbers += 6) {
        Crop *c = all + i;
        c->left = numbers[0], c->top = numbers[1], c->width = numbers[2], c->height = numbers[3];
        c->size = numbers[4], c->flip = numbers[5];
        c->pitch = (3L * c->size + TOGETHER * LANES - 1) / (TOGETHER * LANES) * (TOGETHER * LANES);
        c->across = take_weights(&at, c->width, c->size), c->down = take_weights(&at, c->height, c->size);
        c->thin = take(&at, c->height * c->pitch);
        right = c->left + c->width > right ? c->left + c->width : right;
        size = c->size > size ? c->size : size;
    }
    *tile = take(&at, (3L * right + LANES) * LANES);
    *turned = take(&at, (3L * size + LANES) * LANES);
    return at - scratch;
}

long scratch_size(int crops, const int *numbers)
{
    Crop all[crops];
    bytes *tile, *turned;
    return lay_out(crops, numbers, all, &tile, &turned, 0);
}

/* image: (.., .., 3), rows `stride` bytes apart. numbers: left, top, width, height, size, flip of each crop. Crop i
 * goes to outs[i], (size, size, 3). scratch: scratch_size() bytes, aligned to 64. */
void cut_crops(const uint8_t *image, long stride, int crops, const int *numbers, uint8_t *const *outs, void *scratch)
{
    Crop all[crops];
    bytes *tile, *turned;
    lay_out(crops, numbers, all, &tile, &turned, scratch);
    int top = all[0].top, bottom = 0;
    for (int i = 0; i < crops; i++) {
        Crop *c = all + i;
        weigh(c->across, c->width, c->size, c->flip);
        weigh(c->down, c->height, c->size, 0);
        top = c->top < top ? c->top : top;
        bottom = c->top + c->height > bottom ? c->top + c->height : bottom;
    }
    for (int y = top; y < bottom; y += LANES) {
        int left = INT32_MAX, right = 0;
        for (int i = 0; i < crops; i++)
            if (all[i].top < y + LANES && y < all[i].top + all[i].height) {
                left = all[i].left < left ? all[i].left : left;
                right = all[i].left + all[i].width > right ? all[i].left + all[i].width : right;
            }
        if (left < right)
            turn_rows(image + y * stride + 3 * left, stride, 3 * (right - left), bottom - y, tile);
        for (int i = 0; i < crops; i++)
            if (all[i].top < y + LANES && y < all[i].top + all[i].height)
                resize_across(all + i, tile + 3 * (all[i].left - left), y, turned);
    }
    for (int i = 0; i < crops; i++)
        resize_down(all + i, outs[i]);
}
