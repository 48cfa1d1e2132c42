// Packs: vectors as the small integers that the filter multiplies, with bounds of how far each is from its vector.
//
// A vector v, taken relative to the level's center, is first shortened to [B v, |v - B^T B v|]: its components in a basis B of
// a few orthonormal rows, and the length of what the basis leaves over. Shortening keeps the lengths of a query q and a row x,
// and makes no product too small:
//
//     q.x <= (B q).(B x) + |rest of q| |rest of x|                                                      (Cauchy-Schwarz)
//
// The shortened vector is then rounded to v' = step * code with integer codes, and the residual |v - v'| is stored. For
// shortened q and x
//
//     |q.x - q'.x'| <= |q - q'| |x| + |q'| |x - x'|                                                     (Cauchy-Schwarz)
//
// where q'.x' is a sum of products of integers, which no processor rounds. So the filter bounds every distance from below:
// |q - x|^2 = |q|^2 + |x|^2 - 2 q.x. Without a basis, vectors are rounded without being shortened.
//
// With few channels, turning such sums into bounds takes longer than the sums. Where a packing has a unit, the eight rows of a
// group therefore share a step, the step of a query is the unit over a small integer c, and codes are followed by digits: those
// of a row are the integer h = floor((|x|^2 - least |x|^2 of the group) / 2 / (step_x * unit)), written as fine + base *
// coarse, those of a query are -c for the fine digit, and -c * base, spread over the coarse ones. The products of the digits
// add up to
//
//     -c h  >=  -(|x|^2 - least |x|^2) / 2 / (step_x * step_q)
//
// so that of a group's rows the one with the largest sum has the least bound, and only that sum is turned into one. An h that
// is beyond the digits is cut, and a query that is too long for the unit has c = 0: its bounds are lower than they could be.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <memory>

#include "buffer.hpp"
#include "vectors.hpp"

namespace spade {

constexpr int kPanel = 16;            // queries of a panel: their products are computed side by side, one in each lane
constexpr int kGroup = 8;             // rows of a group: the filter returns one minimum for all of them
constexpr int kRowAlign = 16;         // the number of rows is padded to a multiple of this
constexpr int kMostChannels = 65536;  // with more channels, a sum of products could exceed 32 bits
// The square of a smaller number may be 0 in float32.
constexpr float kVanishing = 0x1p-63f;

constexpr int round_up(int value, int multiple) { return (value + multiple - 1) / multiple * multiple; }

// The integers that a SIMD level multiplies: unsigned ones for rows, signed ones for queries.
struct CodeFormat {
    int max_row_code;    // the largest magnitude of a row's code before the offset is added
    int row_offset;      // what is added to a row's codes to make them unsigned
    int max_query_code;  // the largest magnitude of a query's code
    int alignment;       // the number of codes is padded to a multiple of this
};

// The fewest digits behind the codes of a packing with a unit, and the most that are of use.
constexpr int kLeastDigits = 4, kMostDigits = 16;

// Codes that fill a byte, for instructions that add products of bytes up in 32 bits: VNNI and AMX.
constexpr CodeFormat eight_bit_codes(int alignment) { return {127, 128, 127, alignment}; }
// Codes for AVX2, which adds products of bytes up in 16 bits: four sums of two products fit, since 4 * 2 * 63 * 63 < 2^15.
constexpr CodeFormat six_bit_codes(int alignment) { return {31, 32, 63, alignment}; }

// How vectors are encoded. Only packs that were made by the same Packing can be searched in each other.
struct Packing {
    // `center`: (d). `basis`: (components, d), orthonormal rows; nullptr and 0 for none. `unit`: the step of the longest
    // queries that have digits; 0 for none.
    Packing(CodeFormat format, int d, const float* center, const float* basis, int components, float unit = 0);

    // The number of values that a vector is shortened to.
    int length() const { return components ? components + 1 : d; }
    // A bound of the rounding error of a vector's components, as a share of its length: each is a sum of d products.
    float basis_rounding() const {
        return components ? static_cast<float>(d) * (std::sqrt(static_cast<float>(components)) + 1) * 0x1p-24f : 0.0f;
    }

    bool has_digits() const { return digits > 0; }
    // The largest h that the digits of a row hold.
    int most_height() const { return base - 1 + base * (format.max_row_code + format.row_offset); }

    CodeFormat format;
    int d, components;
    float unit;
    int stride;             // the number of codes and digits of a packed vector, padded
    int code_stride;        // the number of codes, padded to whole registers of 16-bit integers; may be more than stride
    int digits;             // the first is the fine one; 0 without a unit
    int most_parts;         // the largest c of a query
    int base;               // what a coarse digit counts
    float rounding;         // a bound of all rounding errors of float32 (norms, centering, basis), as a share of |q|^2 + |x|^2
    Buffer<float> center;   // (d)
    int padded_components;  // components, padded to whole registers
    Buffer<float> basis;    // (d, padded_components): the basis transposed, so that registers hold one channel of all its rows
};

// What a filter reads of rows: their number is padded to a multiple of kRowAlign, that of codes of each to a multiple of 16.
//
// The caller keeps the memory alive. After the last row, up to 64 bytes more are read, which may hold anything.
struct RowCodes {
    bool has_digits() const { return group_step != nullptr; }

    const std::uint8_t* codes;  // (padded rows, stride)
    const float* step;          // (padded rows)
    const float* half_sq_norm;  // (padded rows)
    int stride;
    // What screens read, and filters of packs with digits; as in `RowPack`, and nullptr where it has none.
    float rounding = 0;
    const float *max_norm = nullptr, *max_residual = nullptr;
    const float *group_step = nullptr, *least_half_sq_norm = nullptr;
};

// The rows of a block. Rows beyond `count` are padding at an infinite distance.
struct RowPack {
    RowPack(std::shared_ptr<const Packing> packing, const Vectors& rows);
    std::size_t nbytes() const {
        return codes.nbytes() + step.nbytes() + half_sq_norm.nbytes() + norm.nbytes() + residual.nbytes() + max_norm.nbytes() +
               max_residual.nbytes() + repeats.nbytes() + group_step.nbytes() + least_half_sq_norm.nbytes();
    }

    operator RowCodes() const {
        const bool has_digits = packing->has_digits();
        return {codes.data(),
                step.data(),
                half_sq_norm.data(),
                stride,
                packing->rounding,
                max_norm.data(),
                max_residual.data(),
                has_digits ? group_step.data() : nullptr,
                has_digits ? least_half_sq_norm.data() : nullptr};
    }

    std::shared_ptr<const Packing> packing;
    int count, stride, groups;
    Buffer<std::uint8_t> codes;            // (padded rows, stride)
    Buffer<float> step;                    // (padded rows)
    Buffer<float> half_sq_norm;            // (padded rows): |x|^2 / 2, infinite for padding
    Buffer<float> norm, residual;          // (padded rows): upper bounds of |x| and |x - x'|
    Buffer<float> max_norm, max_residual;  // (groups): the largest of them in each group
    Buffer<std::uint8_t> repeats;          // (groups): bit r is set if row r of the group equals the row before it
    // (groups): the step of all rows, and the least half_sq_norm. Of a packing with a unit only.
    Buffer<float> group_step, least_half_sq_norm;
};

// Queries, in panels of kPanel.
struct QueryPack {
    QueryPack(std::shared_ptr<const Packing> packing, const Vectors& queries);
    // Memory for up to `capacity` queries, which `assign` encodes.
    QueryPack(std::shared_ptr<const Packing> packing, int capacity);
    // Encodes the queries at these addresses, by a packing of the same shape.
    void assign(std::shared_ptr<const Packing> packing, const void* const* queries, ElementType type, int count);
    std::size_t nbytes() const {
        return codes.nbytes() + fine_codes.nbytes() + step.nbytes() + initial_dot.nbytes() + fine_step.nbytes() +
               fine_initial_dot.nbytes() + sq_norm.nbytes() + norm.nbytes() + residual.nbytes() + fine_residual.nbytes();
    }

    std::shared_ptr<const Packing> packing;
    int count, stride, panels;
    Buffer<std::int8_t> codes;         // (panels, stride / 4, kPanel, 4): four codes of a query are one lane of a register
    Buffer<std::int16_t> fine_codes;   // (padded queries, code_stride): 16-bit codes, query by query, which rows are refined by
    Buffer<float> step, fine_step;     // (padded queries)
    Buffer<std::int32_t> initial_dot;  // (padded queries): -row_offset * sum(codes), which cancels the offset of the rows
    Buffer<std::int32_t> fine_initial_dot;
    Buffer<float> sq_norm;                        // (padded queries): |q|^2
    Buffer<float> norm, residual, fine_residual;  // (padded queries): upper bounds of |q'|, by either codes, and |q - q'|
};

}  // namespace spade
