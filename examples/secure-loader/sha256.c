/* SPDX-License-Identifier: GPL-2.0-or-later */
/* FIPS 180-4.  The constants are the fractions of the roots of primes, made here rather than listed: two integer roots do. */
#include "sha256.h"

static uint32_t constants[64], initial[8];

/* The first 32 bits of the fraction of the square (degree 2) or cube root (3) of a number, by bisection on 35 + 32 bits. */
static uint32_t root_fraction(uint32_t number, int degree)
{
    uint64_t low = 0, high = (uint64_t)20 << 32; /* the largest prime is 311, its square root below 18 */
    while (high - low > 1) {
        uint64_t middle = (low + high) / 2;
        /* middle^degree, as a fixed-point number with 32 bits of fraction, compared exactly in 32-bit limbs */
        uint32_t limbs[7] = {1, 0, 0, 0, 0, 0, 0};
        for (int d = 0; d < degree; d++) {
            uint32_t product[7] = {0, 0, 0, 0, 0, 0, 0};
            for (int i = 0; i < 2; i++) {
                uint32_t part = (uint32_t)(middle >> 32 * i);
                uint64_t carry = 0;
                for (int j = 0; i + j < 7; j++) {
                    carry += product[i + j] + (uint64_t)part * limbs[j];
                    product[i + j] = (uint32_t)carry;
                    carry >>= 32;
                }
            }
            for (int i = 0; i < 7; i++)
                limbs[i] = product[i];
        }
        int above = limbs[degree + 1] || limbs[degree] >= number;
        if (above)
            high = middle;
        else
            low = middle;
    }
    return (uint32_t)low;
}

static void make_constants(void)
{
    int count = 0;
    for (uint32_t number = 2; count < 64; number++) {
        int prime = 1;
        for (uint32_t divisor = 2; divisor * divisor <= number; divisor++)
            prime &= number % divisor != 0;
        if (!prime)
            continue;
        if (count < 8)
            initial[count] = root_fraction(number, 2);
        constants[count++] = root_fraction(number, 3);
    }
}

static uint32_t rotate(uint32_t x, int by)
{
    return x >> by | x << (32 - by);
}

static void block(uint32_t *state, const uint8_t *data)
{
    uint32_t w[64], s[8];
    for (int i = 0; i < 16; i++)
        w[i] = (uint32_t)data[4 * i] << 24 | data[4 * i + 1] << 16 | data[4 * i + 2] << 8 | data[4 * i + 3];
    for (int i = 16; i < 64; i++) {
        uint32_t a = w[i - 15], b = w[i - 2];
        w[i] = w[i - 16] + (rotate(a, 7) ^ rotate(a, 18) ^ a >> 3) + w[i - 7] + (rotate(b, 17) ^ rotate(b, 19) ^ b >> 10);
    }
    for (int i = 0; i < 8; i++)
        s[i] = state[i];
    for (int i = 0; i < 64; i++) {
        uint32_t e = s[4], a = s[0];
        uint32_t one = s[7] + (rotate(e, 6) ^ rotate(e, 11) ^ rotate(e, 25)) + ((e & s[5]) ^ (~e & s[6])) + constants[i] + w[i];
        uint32_t two = (rotate(a, 2) ^ rotate(a, 13) ^ rotate(a, 22)) + ((a & s[1]) ^ (a & s[2]) ^ (s[1] & s[2]));
        for (int j = 7; j > 0; j--)
            s[j] = s[j - 1];
        s[4] += one;
        s[0] = one + two;
    }
    for (int i = 0; i < 8; i++)
        state[i] += s[i];
}

void sha256(const uint8_t *data, uint32_t size, uint8_t *digest)
{
    uint32_t state[8], done = 0;
    uint8_t last[128];
    make_constants();
    for (int i = 0; i < 8; i++)
        state[i] = initial[i];
    for (; size - done >= 64; done += 64)
        block(state, data + done);
    uint32_t rest = size - done, length = rest < 56 ? 64 : 128;
    for (uint32_t i = 0; i < length; i++)
        last[i] = i < rest ? data[done + i] : i == rest ? 0x80 : 0;
    for (int i = 0; i < 5; i++)
        last[length - 1 - i] = (uint8_t)((uint64_t)size * 8 >> 8 * i);
    for (uint32_t i = 0; i < length; i += 64)
        block(state, last + i);
    for (int i = 0; i < DIGEST; i++)
        digest[i] = (uint8_t)(state[i / 4] >> (24 - 8 * (i % 4)));
}
