// Windows: the nearest vectors within a window around each query's own place, in the maps of some images.
//
// Every vector of a window is compared directly. A map is decoded once for all test images that are searched in it, as many of
// its rows at a time as a window is high, and what a query has met before ends most comparisons after a part of the channels.
#pragma once

#include <cstdint>

#include "gallery.hpp"

namespace spade {

// The queries at the locations from `first` up to, but not including, `last`, of some test images.
struct WindowQueries {
    Vectors xq;  // (images * locations, d) float32: the vectors of the whole maps
    int images, first, last;
    int count() const { return last - first; }
};

// The k nearest vectors that each query has met so far: (images, queries, k), ascending by squared distance, then by id. They
// begin as infinities and ids of -1.
struct WindowHits {
    int k;
    float* sq_dist;
    std::int64_t* id;
};

// Takes the vectors of all windows in a gallery into `hits`.
//
//   rows: for each image of the gallery, its number: the vector at location l has the id rows[image] * locations + l.
//   wanted: (images of the gallery, test images), whether a test image is searched in an image.
//   radius: how many cells a window reaches up, down, left and right.
//
// A squared distance is that of `sq_distances`, to the bit. What is found depends neither on the order of the images, which
// should be that of their distance, nor on what else is searched; an image must not be searched twice.
void search_windows(const Gallery& gallery, const std::int64_t* rows, const std::uint8_t* wanted, const WindowQueries& queries,
                    int radius, const WindowHits& hits);

}  // namespace spade
