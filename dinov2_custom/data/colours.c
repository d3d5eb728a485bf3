/* The colour changes of one crop, as in pixels.py: the same whole numbers, without arrays in between.
 *
 * Compiled at run time by native.py where there is a C compiler; everything works without, with the same pixels, only
 * slower. pixels is (size, size, 3) uint8; x is (3, size, size), what comes of it; row is what finish.pack_draw writes;
 * scratch has room for (size + 9) * size bytes. Read change_colours, the last function, first.
 */
#include <math.h>
#include <stdint.h>
#include <string.h>

enum { BRIGHTNESS = 1, CONTRAST, SATURATION, HUE };
enum { STEPS = 4, GRAY = 8, SOLARIZE = 9, BLUR = 10, RADIUS = 4 };

static void split(const uint8_t *restrict pixels, uint8_t *restrict x, int n)
{
    uint8_t *r = x, *g = x + n, *b = x + 2 * n;
    for (int i = 0; i < n; i++)
        r[i] = pixels[3 * i], g[i] = pixels[3 * i + 1], b[i] = pixels[3 * i + 2];
}

static void luma(const uint8_t *x, uint8_t *grey, int n)
{
    const uint8_t *r = x, *g = x + n, *b = x + 2 * n;
    for (int i = 0; i < n; i++) {
        uint16_t total = (uint16_t)(77 * r[i]);
        total = (uint16_t)(total + 150 * g[i]);
        total = (uint16_t)(total + 29 * b[i] + 128);
        grey[i] = (uint8_t)(total >> 8);
    }
}

static inline int16_t clamp(int16_t v, int16_t low, int16_t high) { return v < low ? low : v > high ? high : v; }

static void blend_level(uint8_t *x, int n, int16_t base, int16_t gain, int shift)
{
    for (int i = 0; i < n; i++) {
        int16_t change = (int16_t)((int16_t)(x[i] - base) * gain);
        x[i] = (uint8_t)clamp((int16_t)(x[i] + (change >> shift)), 0, 255);
    }
}

static void blend_plane(uint8_t *restrict x, const uint8_t *restrict base, int n, int16_t gain, int shift)
{
    for (int i = 0; i < n; i++) {
        int16_t change = (int16_t)((int16_t)(x[i] - base[i]) * gain);
        x[i] = (uint8_t)clamp((int16_t)(x[i] + (change >> shift)), 0, 255);
    }
}

static inline int16_t turn(int16_t x, int16_t ahead, int16_t low, int16_t high, int16_t move)
{
    int16_t risen = (int16_t)(low + move - ahead + x);
    risen = risen < x ? x : risen;
    risen = risen > high ? high : risen;
    int16_t fallen = (int16_t)(risen - ahead + high - move);
    fallen = fallen > risen ? risen : fallen;
    return fallen < low ? low : fallen;
}

/* Move number k of passes, for 1 or 2 passes without a division. */
static inline int16_t part(int16_t total, int k, int passes)
{
    if (passes == 1)
        return total;
    if (passes == 2)
        return k ? (int16_t)(total - (total >> 1)) : (int16_t)(total >> 1);
    return (int16_t)(total * (k + 1) / passes - total * k / passes);
}

static inline void turn_all(uint8_t *a, uint8_t *b, uint8_t *c, int n, float size, int passes)
{
    for (int i = 0; i < n; i++) {
        int16_t p = a[i], q = b[i], r = c[i];
        int16_t high = p > q ? p : q, low = p < q ? p : q;
        high = high > r ? high : r;
        low = low < r ? low : r;
        int16_t total = (int16_t)rintf((float)(int16_t)(high - low) * size);
        for (int k = 0; k < passes; k++) {
            int16_t move = part(total, k, passes);
            int16_t p1 = turn(p, q, low, high, move), q1 = turn(q, r, low, high, move), r1 = turn(r, p, low, high, move);
            p = p1, q = q1, r = r1;
        }
        a[i] = (uint8_t)p, b[i] = (uint8_t)q, c[i] = (uint8_t)r;
    }
}

/* Forward: the channel ahead of red is green; backward it is blue. */
static void turn_hue(uint8_t *x, int n, float sextants)
{
    uint8_t *r = x, *second = sextants > 0 ? x + n : x + 2 * n, *third = sextants > 0 ? x + 2 * n : x + n;
    float size = fabsf(sextants);
    int passes = (int)ceilf(size / 0.5f);
    if (passes == 1)
        turn_all(r, second, third, n, size, 1);
    else if (passes == 2)
        turn_all(r, second, third, n, size, 2);
    else
        turn_all(r, second, third, n, size, passes);
}

static int mirror(int i, int size)
{
    int period = size > 1 ? 2 * (size - 1) : 1;
    i = i < 0 ? -i : i;
    i %= period;
    return i < period - i ? i : period - i;
}

static inline void add_taps(uint8_t *restrict out, const uint8_t *const *taps, int n, const uint16_t *w)
{
    const uint8_t *c = taps[RADIUS];
    for (int i = 0; i < n; i++) {
        uint16_t total = (uint16_t)(c[i] * w[0] + 128);
        for (int d = 1; d <= RADIUS; d++)
            total = (uint16_t)(total + (uint16_t)(taps[RADIUS - d][i] + taps[RADIUS + d][i]) * w[d]);
        out[i] = (uint8_t)(total >> 8);
    }
}

/* One plane: columns into scratch, then rows back. */
static void blur(uint8_t *x, int size, const uint16_t *w, uint8_t *scratch)
{
    const uint8_t *taps[2 * RADIUS + 1];
    for (int y = 0; y < size; y++) {
        for (int d = -RADIUS; d <= RADIUS; d++)
            taps[RADIUS + d] = x + mirror(y + d, size) * size;
        add_taps(scratch + y * size, taps, size, w);
    }
    uint8_t *line = scratch + size * size; /* with RADIUS more at either end */
    for (int y = 0; y < size; y++) {
        memcpy(line + RADIUS, scratch + y * size, (size_t)size);
        for (int d = 1; d <= RADIUS; d++) {
            line[RADIUS - d] = scratch[y * size + mirror(-d, size)];
            line[RADIUS + size - 1 + d] = scratch[y * size + mirror(size - 1 + d, size)];
        }
        for (int d = -RADIUS; d <= RADIUS; d++)
            taps[RADIUS + d] = line + RADIUS + d;
        add_taps(x + y * size, taps, size, w);
    }
}

static void step(uint8_t *x, int n, int code, float value, uint8_t *grey)
{
    if (code == HUE) {
        turn_hue(x, n, value);
        return;
    }
    int shift = 15;
    while (shift > 0 && fabsf(value) * (float)(1 << shift) > 128)
        shift--;
    int16_t gain = (int16_t)(value * (float)(1 << shift)), base = 0;
    if (code != BRIGHTNESS)
        luma(x, grey, n);
    if (code == SATURATION) {
        for (int plane = 0; plane < 3; plane++)
            blend_plane(x + plane * n, grey, n, gain, shift);
        return;
    }
    if (code == CONTRAST) {
        uint64_t total = 0;
        for (int i = 0; i < n; i++)
            total += grey[i];
        base = (int16_t)((double)total / n + 0.5);
    }
    blend_level(x, 3 * n, base, gain, shift);
}

void change_colours(const uint8_t *pixels, uint8_t *x, int size, const float *row, uint8_t *scratch)
{
    int n = size * size, planes = 3;
    split(pixels, x, n);
    for (int i = 0; i < STEPS; i++)
        if (row[2 * i] > 0)
            step(x, n, (int)row[2 * i], row[2 * i + 1], scratch);
    if (row[GRAY] > 0) {
        luma(x, scratch, n);
        memcpy(x, scratch, (size_t)n);
        planes = 1;
    }
    if (row[BLUR] > 0) {
        uint16_t w[RADIUS + 1];
        for (int d = 0; d <= RADIUS; d++)
            w[d] = (uint16_t)row[BLUR + d];
        for (int plane = 0; plane < planes; plane++)
            blur(x + plane * n, size, w, scratch);
    }
    if (row[SOLARIZE] > 0)
        for (int i = 0; i < planes * n; i++)
            x[i] = x[i] < 128 ? x[i] : (uint8_t)(255 - x[i]);
    if (planes == 1) {
        memcpy(x + n, x, (size_t)n);
        memcpy(x + 2 * n, x, (size_t)n);
    }
}
