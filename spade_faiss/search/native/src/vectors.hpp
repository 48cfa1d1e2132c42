// Vectors as the caller holds them.
#pragma once

#include <cstddef>

namespace spade {

enum class ElementType { kFloat16, kFloat32, kInt8 };

constexpr std::size_t size_of(ElementType type) {
    return type == ElementType::kFloat32 ? 4 : type == ElementType::kFloat16 ? 2 : 1;
}

// A C-contiguous array (count, d) at any address, aligned or not. It is a view: the caller keeps the memory alive.
struct Vectors {
    const void* data;
    ElementType type;
    int count, d;
    const float* scale = nullptr;  // (d), what the integers of each channel are multiplied by; of kInt8 alone
    std::size_t row_bytes() const { return static_cast<std::size_t>(d) * size_of(type); }
    const void* row(int i) const { return static_cast<const char*>(data) + i * row_bytes(); }
};

}  // namespace spade
