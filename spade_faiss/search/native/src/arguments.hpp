// What the functions that Python calls check of their arguments.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "packs.hpp"
#include "simd_levels.hpp"
#include "vectors.hpp"

namespace spade {

namespace py = pybind11;

inline void require(bool holds, const std::string& message) {
    if (!holds) throw py::value_error(message);
}

inline bool is_contiguous(const py::array& array) { return array.flags() & py::array::c_style; }

inline bool is_aligned(const void* data) { return reinterpret_cast<std::uintptr_t>(data) % alignof(float) == 0; }

// A view of an array (n, d) of float16 or float32, at any address.
inline Vectors vectors_of(const py::array& array, const std::string& name) {
    const bool is_float32 = array.dtype().equal(py::dtype::of<float>()), is_float16 = array.dtype().equal(py::dtype("e"));
    require((is_float32 || is_float16) && array.ndim() == 2 && is_contiguous(array),
            name + " must be (n, d) float16 or float32, C-contiguous");
    require(array.shape(1) > 0 && array.shape(1) <= kMostChannels, name + " must have 1 to 65536 channels");
    require(array.shape(0) < (1 << 28), name + " must be fewer than 2^28");
    return {array.data(), is_float16 ? ElementType::kFloat16 : ElementType::kFloat32, static_cast<int>(array.shape(0)),
            static_cast<int>(array.shape(1))};
}

// The numbers of a float32 array of this shape; `requirement` begins the message if it is another.
inline const float* floats_of(const py::array& array, const std::vector<py::ssize_t>& shape, const std::string& requirement) {
    bool is_same = array.ndim() == static_cast<py::ssize_t>(shape.size());
    for (std::size_t axis = 0; is_same && axis < shape.size(); ++axis) is_same = array.shape(axis) == shape[axis];
    require(is_same && array.dtype().equal(py::dtype::of<float>()) && is_contiguous(array) && is_aligned(array.data()),
            requirement + " float32, C-contiguous and aligned");
    return static_cast<const float*>(array.data());
}

// A view of an array (n, d) of float16 or float32, or of stored codes: (n, d) int8, or (n, bytes) uint8 where they are packed.
// The caller keeps both alive.
inline Vectors stored_of(const py::array& array, const StoredCodes* codes, const std::string& name) {
    if (!codes) return vectors_of(array, name);
    const bool packed = !codes->packed.empty();
    const py::dtype type = packed ? py::dtype::of<std::uint8_t>() : py::dtype::of<std::int8_t>();
    require(array.dtype().equal(type) && array.ndim() == 2 && is_contiguous(array) &&
                array.shape(1) == static_cast<py::ssize_t>(codes->vector_bytes),
            name + " must be (n, " + std::to_string(codes->vector_bytes) + ") " + (packed ? "uint8" : "int8") +
                ", C-contiguous, as their codes say");
    require(array.shape(0) < (1 << 28), name + " must be fewer than 2^28");
    return {array.data(), ElementType::kCodes, static_cast<int>(array.shape(0)), codes->d, codes};
}

inline const SimdLevel& level_of(const std::string& name) {
    const SimdLevel* level = find_simd_level(name);
    require(level != nullptr, "there is no SIMD level '" + name + "'");
    return *level;
}

// What Python sees as Packing: a packing, and the SIMD level whose code format it has.
struct LevelPacking {
    const SimdLevel* level;
    std::shared_ptr<const Packing> packing;
};

}  // namespace spade
