// The gallery: the vectors of all normal images at one level, where the bank stores them, and read one by one.
#pragma once

#include <cstdint>
#include <vector>

#include "vectors.hpp"

namespace spade {

// One of the stored maps that a level consists of. Levels that are searched as one are resized to the finest grid, bilinearly:
// along each axis, a position is made of one or two stored ones.
struct MapPart {
    struct Taps {
        int first, second;  // stored positions; second is -1 where one is enough
        float first_weight, second_weight;
    };
    ElementType type;
    int channels, width;                 // of the stored map
    std::vector<Taps> rows, columns;     // of the searched grid; empty where the stored map has that grid
    std::vector<const void*> maps;       // of each image: (height * width, channels)
    const StoredCodes* codes = nullptr;  // of kCodes alone
    std::size_t vector_bytes() const { return bytes_of(type, codes, channels); }
};

// The vector of image i at location l has the id i * locations + l. The caller keeps the maps alive.
struct Gallery {
    int d, width;        // channels of a vector, and columns of the searched grid
    int locations;       // of one image
    std::int64_t count;  // of vectors
    std::vector<MapPart> parts;

    // Writes a vector as float32, followed by zeros up to `padded`, a multiple of eight. Its numbers are the ones, to the bit,
    // that resizing whole maps gives: products and sums are rounded one by one.
    void decode(std::int64_t id, int padded, float* to) const;
    // Asks the processor for what `decode` will read.
    void prefetch(std::int64_t id) const;
};

// The squared distances (n, k) of n queries to k vectors of the gallery each; infinity for an id of -1.
void sq_distances_to(const Gallery& gallery, const Vectors& xq, const std::int64_t* ids, int k, float* sq_dist);

}  // namespace spade
