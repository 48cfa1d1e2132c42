// Vectors as the caller holds them.
#pragma once

#include <cstddef>

namespace spade {

enum class ElementType { kFloat16, kFloat32 };

// A C-contiguous array (count, d) at any address, aligned or not. It is a view: the caller keeps the memory alive.
struct Vectors {
    const void* data;
    ElementType type;
    int count, d;
    std::size_t row_bytes() const { return static_cast<std::size_t>(d) * (type == ElementType::kFloat16 ? 2 : 4); }
    const void* row(int i) const { return static_cast<const char*>(data) + i * row_bytes(); }
};

}  // namespace spade
