// Vectors as small integers: what the filter multiplies, and how far each is from what it stands for.
//
// A vector less the level's center, v, is first shortened to [B v, |v - B^T B v|]: its components in a basis of few orthonormal
// rows, and the length of the rest. For a query q and a row x that keeps the lengths, and makes no product too small:
//
//     q.x <= (B q).(B x) + |rest of q| |rest of x|                                                      (Cauchy-Schwarz)
//
// Then it is kept as v' = step * code with integer codes; |v - v'| is known. For shortened q and x
//
//     |q.x - q'.x'| <= |q - q'| |x| + |q'| |x - x'|                                                       (the same)
//
// where q'.x' is a sum of products of integers, which no processor rounds. So the filter bounds every distance from below:
// |q - x|^2 = |q|^2 + |x|^2 - 2 q.x. Without a basis vectors are not shortened.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <new>

namespace spade {

constexpr int kPanel = 16;      // queries whose products are made side by side: the lanes of a vector
constexpr int kGroup = 8;       // rows of which one minimum is kept
constexpr int kRowAlign = 16;   // rows are padded to a multiple of it
constexpr int kMostChannels = 65536;  // beyond, a sum of products could leave 32 bits
// Numbers below it may be squared to 0, and flushed to 0 by whoever set the processor so.
constexpr float kVanishing = 0x1p-63f;

// The integers that a unit multiplies: rows are unsigned, `zero` stands for 0.
struct Format {
    int row_most;    // the largest magnitude of a row's code
    int zero;        // added to a row's codes
    int query_most;  // the largest magnitude of a query's code
    int align;       // channels are padded to a multiple of it
};

// One byte a number, as dot products of bytes take them: VNNI, the tile unit.
constexpr Format wide(int align) { return {127, 128, 127, align}; }
// Four products of two numbers each fit into 16 bits: 4 * 2 * 63 * 63 < 2^15. For AVX2, whose sums are of 16 bits.
constexpr Format narrow(int align) { return {31, 32, 63, align}; }

template <typename T>
class Buffer {  // zeros, aligned to a cache line
public:
    explicit Buffer(std::size_t size) : size_(size), data_(new (std::align_val_t(64)) T[size + 64 / sizeof(T)]()) {}
    T* data() { return data_.get(); }
    const T* data() const { return data_.get(); }
    T& operator[](std::size_t i) { return data_.get()[i]; }
    const T& operator[](std::size_t i) const { return data_.get()[i]; }
    std::size_t nbytes() const { return size_ * sizeof(T); }

private:
    struct Free {
        void operator()(T* p) const { ::operator delete[](p, std::align_val_t(64)); }
    };
    std::size_t size_;
    std::unique_ptr<T[], Free> data_;
};

enum class Type { kFloat16, kFloat32 };

// Vectors as they are, row after row, at any address.
struct Vectors {
    const void* data;
    Type type;
    int count, d;
    std::size_t row_bytes() const { return static_cast<std::size_t>(d) * (type == Type::kFloat16 ? 2 : 4); }
    const void* row(int i) const { return static_cast<const char*>(data) + i * row_bytes(); }
};

// What vectors are packed by. Packs that meet must be made by the same one.
struct Packing {
    // `basis`: (components, d), orthonormal rows; nullptr for none.
    Packing(Format format, int d, const float* center, const float* basis, int components);

    // Numbers that are kept of a vector.
    int length() const { return components ? components + 1 : d; }
    // How far components may be from what they should be, as a share of the vector's length: sums of one product after another.
    float of_basis() const {
        return components ? static_cast<float>(d) * (std::sqrt(static_cast<float>(components)) + 1) * 0x1p-24f : 0.0f;
    }

    Format format;
    int d, components;
    int stride;      // numbers of a packed vector, padded
    float rounding;  // what float32 may lose of norms, centering, the basis and all: a share of |q|^2 + |x|^2
    Buffer<float> center;
    int columns;           // components, padded
    Buffer<float> basis;   // (d, columns): what one channel adds to all components is side by side
};

// The rows of a block. Rows beyond `count` are as far as can be.
struct RowPack {
    RowPack(std::shared_ptr<const Packing> packing, const Vectors& rows);
    std::size_t nbytes() const {
        return codes.nbytes() + step.nbytes() + half.nbytes() + reach.nbytes() + residual.nbytes() + group_reach.nbytes() +
               group_residual.nbytes() + repeats.nbytes();
    }

    std::shared_ptr<const Packing> packing;
    int count, stride, groups;
    Buffer<std::uint8_t> codes;                // (padded rows, stride)
    Buffer<float> step;                        // of each row
    Buffer<float> half;                        // |x|^2 / 2 of each row, infinite for padding
    Buffer<float> reach, residual;             // of each row: at least |x|, and |x - x'|
    Buffer<float> group_reach, group_residual;  // the most of them in each group
    Buffer<std::uint8_t> repeats;              // of each group, a bit for each row: whether it is equal to the row before
};

// Queries, in panels: [panel][channel / 4][query][channel % 4].
struct QueryPack {
    QueryPack(std::shared_ptr<const Packing> packing, const Vectors& queries);
    std::size_t nbytes() const {
        return codes.nbytes() + lines.nbytes() + step.nbytes() + start.nbytes() + sq_norm.nbytes() + norm.nbytes() +
               residual.nbytes();
    }

    std::shared_ptr<const Packing> packing;
    int count, stride, panels;
    Buffer<std::int8_t> codes;
    Buffer<std::int16_t> lines;    // (queries, stride): the same codes, query by query
    Buffer<float> step;
    Buffer<std::int32_t> start;    // what cancels the rows' `zero`: -zero * sum(codes)
    Buffer<float> sq_norm;         // |q|^2
    Buffer<float> norm, residual;  // at least |q'|, and |q - q'|
};

}  // namespace spade
