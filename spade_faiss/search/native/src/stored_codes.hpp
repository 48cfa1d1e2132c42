// Stored codes: how the small integers that a bank stores of a vector become its numbers.
//
// A number is a code times its scale. Codes take a byte each, or are packed: each in as many bits as it is given, one behind
// the other, the lowest bit first. Packed, a code of b bits is the odd number 2 u + 1 - 2^b, and u is what is stored.
//
// Eight packed codes take at most 56 bits, so that they are read as one word of 64, whatever bit they begin at.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "buffer.hpp"

namespace spade {

constexpr int kMostCodeBits = 7;

// Eight packed codes that follow each other, those beyond the last one being 0.
struct PackedEight {
    std::size_t begin;  // the byte of the vector that their word begins at
    // Of the codes 0, 2, 4 and 6 and of those behind them: how far the word is shifted, and which bits are then the code's.
    alignas(32) std::uint64_t even_shift[4], odd_shift[4], even_mask[4], odd_mask[4];
    alignas(32) std::int32_t least[8];  // 2^b - 1, what is taken from 2 u
};

struct StoredCodes {
    // `scale`: (d). `bits`: (d), from 1 to kMostCodeBits; nullptr for a byte each.
    StoredCodes(int d, const float* scale, const std::uint8_t* bits);

    int d;
    std::size_t vector_bytes;
    Buffer<float> scale;              // (d), followed by at least seven zeros
    std::vector<PackedEight> packed;  // empty where codes take a byte each
};

}  // namespace spade
