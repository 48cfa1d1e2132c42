// The parts of the extension module that have files of their own.
#pragma once

#include <pybind11/pybind11.h>

namespace spade {

// Gallery, and distances to its vectors.
void define_gallery(pybind11::module_& module);
// Clusters of a gallery's vectors, and searches in them.
void define_clusters(pybind11::module_& module);

// Greedy k-center.
void define_k_center(pybind11::module_& module);

// Inverted lists of a gallery's vectors, and searches in them.
void define_lists(pybind11::module_& module);

// Maps that are resized and smoothed.
void define_resample(pybind11::module_& module);

// Searches in windows.
void define_windows(pybind11::module_& module);

}  // namespace spade
