// The loops of the 256-bit filters: avx2.cpp and avxvnni.cpp differ in how they multiply codes, and in nothing else.
//
// A function cannot inline another whose target has more instructions, so these functions are compiled anew for each file: it
// defines SPADE_TARGET before it includes this header. The unnamed namespace keeps the two versions apart.
#pragma once

#ifndef SPADE_TARGET
#error "define SPADE_TARGET, the target attribute of the including file, before including filter256.hpp"
#endif

#include <immintrin.h>

#include <cstdint>
#include <cstring>
#include <limits>

#include "filter.hpp"
#include "target.hpp"

namespace spade {
namespace {

// Rows that are multiplied at a time: their sums with the 16 queries of a panel are what the registers hold.
constexpr int kRows = 2;
// A panel of 32-bit sums takes two registers.
constexpr int kRegisters = kPanel / 8;

// Four codes of a row, in each lane.
SPADE_TARGET SPADE_INLINE __m256i broadcast_codes(const std::uint8_t* row) {
    std::int32_t codes;
    std::memcpy(&codes, row, 4);
    return _mm256_set1_epi32(codes);
}

SPADE_TARGET SPADE_INLINE void load_initial_dots(const std::int32_t* initial_dot, __m256i dots[kRows][kRegisters]) {
    for (int r = 0; r < kRows; ++r)
        for (int h = 0; h < kRegisters; ++h)
            dots[r][h] = _mm256_load_si256(reinterpret_cast<const __m256i*>(initial_dot + 8 * h));
}

// Writes the minima of all groups in `groups`. `Products::multiply(x, stride, q, initial_dot, dots)` computes the products of
// kRows rows with a panel of queries: dots[row][register] = initial_dot + the sum over all channels of row code * query code.
//
// It must be inlined: left to itself, GCC 12 keeps fewer of the inner loop's pointers in registers, which costs up to a
// quarter.
template <typename Products>
SPADE_TARGET SPADE_INLINE void filter256(const RowCodes& rows, GroupRange groups, const QueryPack& queries, float* minima) {
    const std::size_t group_size = static_cast<std::size_t>(queries.panels) * kPanel;
    for (int panel = 0; panel < queries.panels; ++panel) {
        const std::int8_t* q = queries.codes.data() + static_cast<std::size_t>(panel) * kPanel * queries.stride;
        const std::int32_t* initial_dot = queries.initial_dot.data() + panel * kPanel;
        const __m256 query_step0 = _mm256_load_ps(queries.step.data() + panel * kPanel);
        const __m256 query_step1 = _mm256_load_ps(queries.step.data() + panel * kPanel + 8);
        float* out = minima + panel * kPanel;
        for (int group = groups.begin; group < groups.end; ++group, out += group_size) {
            __m256 least0 = _mm256_set1_ps(std::numeric_limits<float>::infinity()), least1 = least0;
            for (int row = group * kGroup; row < (group + 1) * kGroup; row += kRows) {
                const std::uint8_t* x = rows.codes + static_cast<std::size_t>(row) * rows.stride;
                __m256i dots[kRows][kRegisters];
                Products::multiply(x, rows.stride, q, initial_dot, dots);
#pragma GCC unroll 4
                for (int r = 0; r < kRows; ++r) {
                    const __m256 row_step = _mm256_broadcast_ss(rows.step + row + r);
                    const __m256 half_sq_norm = _mm256_broadcast_ss(rows.half_sq_norm + row + r);
                    const __m256 dot0 = _mm256_mul_ps(_mm256_cvtepi32_ps(dots[r][0]), row_step);
                    const __m256 dot1 = _mm256_mul_ps(_mm256_cvtepi32_ps(dots[r][1]), row_step);
                    least0 = _mm256_min_ps(_mm256_fnmadd_ps(dot0, query_step0, half_sq_norm), least0);
                    least1 = _mm256_min_ps(_mm256_fnmadd_ps(dot1, query_step1, half_sq_norm), least1);
                }
            }
            _mm256_storeu_ps(out, least0);
            _mm256_storeu_ps(out + 8, least1);
        }
    }
}

}  // namespace
}  // namespace spade
