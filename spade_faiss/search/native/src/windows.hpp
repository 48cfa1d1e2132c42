// Windows: the nearest vectors within a window around each query's own place, in the maps of some images.
//
// What a query has met before bounds what can still be the nearest: codes of a map (window_codes.hpp) say which vectors of a
// window are not beyond that, and those are compared directly. In the first image that is searched, and where most would
// remain, every vector is compared: the map is decoded once for all test images that are searched in it, as many of its rows at
// a time as a window is high, and a comparison ends after the first channels where these say enough.
#pragma once

#include <cstdint>

#include "gallery.hpp"
#include "simd_levels.hpp"

namespace spade {

// The queries at the locations from `first` up to, but not including, `last`, of some test images.
struct WindowQueries {
    Vectors xq;  // (images * locations, d) float32: the vectors of the whole maps
    int images, first, last;
    // (images, locations): how many cells the window of each query reaches, where that is more than the radius; below 0 for a
    // query that nothing is asked for. Null where all windows reach as far as the radius. It is for maps whose cells all are
    // locations, see `WindowCoding`.
    const std::int32_t* reach = nullptr;
    int count() const { return last - first; }
};

// The k nearest vectors that each query has met so far: (images, queries, k), ascending by squared distance, then by id. They
// begin as infinities and ids of -1.
struct WindowHits {
    int k;
    float* sq_dist;
    std::int64_t* id;
};

// Takes the vectors of all windows in some images of a gallery into `hits`.
//
//   images, count: the images that are searched.
//   codes: for each of them, its codes, by this coding and level; vectors of cells that they say are outside are not searched.
//   wanted: (count, test images), whether a test image is searched in an image.
//   radius: how many cells a window reaches up, down, left and right.
//   margin: 1; less breaks the bound of the codes, for tests.
//
// A squared distance is that of `sq_distances`, to the bit. What is found depends neither on the order of the images, which
// should be that of their distance, nor on what else is searched; an image must not be searched twice.
void search_windows(const Gallery& gallery, const std::int64_t* images, std::int64_t count, const SimdLevel& level,
                    const WindowCoding& coding, const WindowCodes* const* codes, const std::uint8_t* wanted,
                    const WindowQueries& queries, int radius, const WindowHits& hits, float margin = 1);

}  // namespace spade
