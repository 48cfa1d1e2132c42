// What Python sees as Gallery.
#pragma once

#include <pybind11/pybind11.h>

#include "gallery.hpp"

namespace spade {

// A gallery, and what it points into.
struct OwnedGallery {
    Gallery gallery;
    pybind11::list kept;
};

}  // namespace spade
