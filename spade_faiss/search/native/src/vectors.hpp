// Vectors as the caller holds them.
#pragma once

#include <cstddef>

#include "stored_codes.hpp"

namespace spade {

// kCodes are those of a StoredCodes, which says what a vector of them takes.
enum class ElementType { kFloat16, kFloat32, kCodes };

// The bytes of a stored vector of d numbers.
inline std::size_t bytes_of(ElementType type, const StoredCodes* codes, int d) {
    if (type == ElementType::kCodes) return codes->vector_bytes;
    return static_cast<std::size_t>(d) * (type == ElementType::kFloat32 ? 4 : 2);
}

// A C-contiguous array (count, d) at any address, aligned or not. It is a view: the caller keeps the memory alive.
struct Vectors {
    const void* data;
    ElementType type;
    int count, d;
    const StoredCodes* codes = nullptr;  // of kCodes alone
    std::size_t row_bytes() const { return bytes_of(type, codes, d); }
    const void* row(int i) const { return static_cast<const char*>(data) + i * row_bytes(); }
};

}  // namespace spade
