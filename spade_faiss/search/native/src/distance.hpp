// Direct distances: sums of squared differences of the vectors themselves, which decide what is found.
#pragma once

#include <immintrin.h>

#include "buffer.hpp"
#include "floats.hpp"
#include "packs.hpp"
#include "target.hpp"

namespace spade {

// Vectors that are compared directly are padded with zeros to a multiple of this.
constexpr int kDistanceAlign = 16;

// Computes the squared distances of a query to R rows of `padded` channels. Each is summed in 32 lanes, which are then added up
// pairwise: d alone decides the order.
template <int R>
SPADE_TARGET_AVX2 SPADE_INLINE void sq_distances(const float* q, const float* const* x, int padded, float* sq_dist) {
    __m256 sums[R][4];
    for (int r = 0; r < R; ++r)
        for (int j = 0; j < 4; ++j) sums[r][j] = _mm256_setzero_ps();
    int i = 0;
    for (; i + 32 <= padded; i += 32)
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j) {
            const __m256 query = _mm256_loadu_ps(q + i + 8 * j);
            for (int r = 0; r < R; ++r) {
                const __m256 difference = _mm256_sub_ps(query, _mm256_load_ps(x[r] + i + 8 * j));
                sums[r][j] = _mm256_fmadd_ps(difference, difference, sums[r][j]);
            }
        }
    if (i < padded)
        for (int j = 0; j < 2; ++j) {
            const __m256 query = _mm256_loadu_ps(q + i + 8 * j);
            for (int r = 0; r < R; ++r) {
                const __m256 difference = _mm256_sub_ps(query, _mm256_load_ps(x[r] + i + 8 * j));
                sums[r][j] = _mm256_fmadd_ps(difference, difference, sums[r][j]);
            }
        }
    for (int r = 0; r < R; ++r) {
        const __m256 eight = _mm256_add_ps(_mm256_add_ps(sums[r][0], sums[r][2]), _mm256_add_ps(sums[r][1], sums[r][3]));
        sq_dist[r] = sum_of_lanes(eight);
    }
}

// The same squared distance of two vectors of d channels as they are stored; `a` is float32.
SPADE_TARGET_AVX2 inline float sq_distance(const float* a, const void* b, ElementType type, const StoredCodes* codes, int d) {
    const int padded = round_up(d, kDistanceAlign);
    Buffer<float> q(padded), x(padded);
    decode(a, ElementType::kFloat32, nullptr, d, padded, q.data());
    decode(b, type, codes, d, padded, x.data());
    const float* const rows[1] = {x.data()};
    float found;
    sq_distances<1>(q.data(), rows, padded, &found);
    return found;
}

}  // namespace spade
