// Inverted lists of codes: the vectors of a gallery, each in the list of a centroid, of which a query searches the nearest few.
//
// A vector x is projected to a few values, y, and encoded relative to the centroid c of its list: codes of a byte each, which
// times a step are y' ~ y - c, and h = (|y'|^2 + s) / 2, where s >= 0 is what the projection leaves over. With u = p - c for a
// projected query p, and u' its codes,
//
//     |u|^2 + 2 h - 2 u'.y'  ~  |u - y'|^2 + s
//
// estimates a squared distance. Rows of a list ascend by h, and the estimate is at least |u|^2 + t^2 - 2 |u'| t with
// t = sqrt(2 h): beyond the estimates that are wanted, that leaves a range of rows. The rows with the least estimates are
// evaluated directly, on the vectors themselves.
#pragma once

#include <cstdint>
#include <vector>

#include "gallery.hpp"
#include "simd_levels.hpp"

namespace spade {

// The codes of a group of images, list by list; each list is padded to a multiple of kRowAlign with rows whose h is infinite.
struct ListCodes {
    RowCodes rows;                     // codes are offset by 128; half_sq_norm is h
    const std::uint32_t* id;           // (padded rows): image * locations + location, the images being those of the group
    std::vector<std::int64_t> starts;  // (lists + 1): the row at which each list begins
    std::vector<std::int64_t> images;  // the bank row of each image
};

class Lists {
public:
    // `centroids`: (count, width) float32. The gallery and all codes must outlive the lists.
    Lists(const SimdLevel& level, const Gallery& gallery, const Vectors& centroids, std::vector<ListCodes> groups);

    int count() const { return centroids_packed_.count; }
    int width() const { return width_; }
    const std::vector<ListCodes>& groups() const { return groups_; }
    const Gallery& gallery() const { return gallery_; }

private:
    friend class ListSearch;

    const SimdLevel& level_;
    const Gallery& gallery_;
    const int width_, padded_;  // values of a projected vector, and what they are padded to
    Buffer<float> centroids_;   // (count, padded)
    RowPack centroids_packed_;
    std::vector<ListCodes> groups_;
};

// Queries, and what is searched for them.
struct ListQueries {
    Vectors xq, projected;                     // float32: the vectors, and what they are projected to
    std::vector<const std::uint8_t*> allowed;  // of each group of lists: which of its images may be found
    int nprobe;                                // lists that a query searches
    int rerank;                                // rows with the least estimates, whose distances are evaluated
};

struct ListStats {
    std::int64_t looked_at = 0;  // rows whose codes were
    bool is_damaged = false;     // ids name vectors that there are not
};

// Writes sq_dist and id (queries, k), ascending; infinity and -1 where fewer are found. What is found for a query does not
// depend on the others; on the SIMD level only as far as its codes of centroids are coarser or finer.
ListStats search_lists(const Lists& lists, const ListQueries& queries, int k, float* sq_dist, std::int64_t* id);

}  // namespace spade
