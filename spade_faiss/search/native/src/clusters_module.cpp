// Python's Clusters: arguments are checked here, computing runs without the GIL.
#include <memory>
#include <optional>
#include <string>
#include <utility>

#include "arguments.hpp"
#include "clusters.hpp"
#include "gallery_module.hpp"
#include "module.hpp"

namespace spade {
namespace {

using Ids = py::array_t<std::int64_t, py::array::c_style>;
using Numbers = py::array_t<std::int32_t, py::array::c_style>;

std::unique_ptr<Clusters> make_clusters(const std::string& simd_level, const OwnedGallery& owned, const py::array& centers,
                                        const Numbers& cluster, const py::array& distance) {
    const SimdLevel& level = level_of(simd_level);
    require(level.why_not.empty(), "SIMD level " + simd_level + " does not run here: " + level.why_not);
    const Gallery& gallery = owned.gallery;
    const Vectors vectors = vectors_of(centers, "centers");
    require(vectors.type == ElementType::kFloat32 && is_aligned(vectors.data) && vectors.d == gallery.d && vectors.count > 0,
            "centers must be (1 or more, d) float32, aligned");
    require(cluster.ndim() == 1 && cluster.shape(0) == gallery.count, "there must be a cluster for each vector of the gallery");
    const float* distances = floats_of(distance, {static_cast<py::ssize_t>(gallery.count)}, "distances must be one a vector,");
    const std::int32_t* clusters = cluster.data();
    const py::gil_scoped_release released;
    for (std::int64_t id = 0; id < gallery.count; ++id)
        if (clusters[id] < 0 || clusters[id] >= vectors.count)
            throw std::invalid_argument("clusters must be those of the centers");
    return std::make_unique<Clusters>(level, gallery, vectors, clusters, distances);
}

// The queries of some images, all of which have as many.
ClusterQueries queries_of(const py::array& queries, const Ids& excluded) {
    const Vectors xq = vectors_of(queries, "queries");
    require(xq.type == ElementType::kFloat32 && is_aligned(xq.data) && xq.count > 0, "queries must be float32, aligned");
    require(excluded.ndim() == 2 && excluded.shape(0) > 0 && xq.count % excluded.shape(0) == 0,
            "there must be excluded images, or none, for each image of the queries");
    return {xq, static_cast<int>(xq.count / excluded.shape(0)), excluded.data(), static_cast<int>(excluded.shape(1))};
}

struct Found {
    Found(int queries, int k)
        : sq_dist({static_cast<py::ssize_t>(queries), static_cast<py::ssize_t>(k)}),
          id({static_cast<py::ssize_t>(queries), static_cast<py::ssize_t>(k)}) {}
    py::array_t<float> sq_dist;
    py::array_t<std::int64_t> id;
};

py::array_t<std::int64_t> counts(const ClusterStats& stats) {
    return py::array_t<std::int64_t>(static_cast<py::ssize_t>(stats.looked_at.size()), stats.looked_at.data());
}

py::tuple py_search_nearest(const Clusters& clusters, const py::array& queries, const Ids& excluded, int k, float margin) {
    const ClusterQueries asked = queries_of(queries, excluded);
    require(asked.xq.d == clusters.channels(), "queries must have the channels of the centers");
    require(k >= 1, "k must be 1 or more");
    Found found(asked.xq.count, k);
    py::array_t<std::int32_t> seed(asked.xq.count);
    float* sq_dist = found.sq_dist.mutable_data();
    std::int64_t* id = found.id.mutable_data();
    std::int32_t* seeds = seed.mutable_data();
    ClusterStats stats;
    {
        const py::gil_scoped_release released;
        stats = search_nearest_cluster(clusters, asked, k, margin, sq_dist, id, seeds);
    }
    return py::make_tuple(found.sq_dist, found.id, seed, counts(stats), stats.evaluated);
}

py::tuple py_search(const Clusters& clusters, std::pair<int, int> range, const py::array& queries, const Ids& excluded,
                    const py::array& bound, const Numbers& seed, int k, float margin) {
    const ClusterQueries asked = queries_of(queries, excluded);
    require(asked.xq.d == clusters.channels(), "queries must have the channels of the centers");
    require(k >= 1, "k must be 1 or more");
    require(0 <= range.first && range.first <= range.second && range.second <= clusters.count() && range.first % kRowAlign == 0,
            "clusters must be a range that begins at a multiple of 16");
    require(seed.ndim() == 1 && seed.shape(0) == asked.xq.count, "there must be a seed for each query");
    const float* bounds = floats_of(bound, {asked.xq.count}, "bound must be one a query,");
    Found found(asked.xq.count, k);
    float* sq_dist = found.sq_dist.mutable_data();
    std::int64_t* id = found.id.mutable_data();
    const std::int32_t* seeds = seed.data();
    const GroupRange groups{range.first / kGroup, round_up(range.second, kRowAlign) / kGroup};
    ClusterStats stats;
    {
        const py::gil_scoped_release released;
        stats = search_clusters(clusters, groups, asked, bounds, seeds, k, margin, sq_dist, id);
    }
    return py::make_tuple(found.sq_dist, found.id, counts(stats), stats.evaluated);
}

void py_pack(Clusters& clusters, int first, int last) {
    require(0 <= first && first <= last && last <= clusters.count(), "clusters must be a range of those that there are");
    const py::gil_scoped_release released;
    clusters.pack(first, last);
}

}  // namespace

void define_clusters(py::module_& module) {
    py::class_<Clusters>(module, "Clusters")
        .def(py::init(&make_clusters), py::arg("simd_level"), py::arg("gallery"), py::arg("centers"), py::arg("cluster"),
             py::arg("distance"), py::keep_alive<1, 3>())
        .def_property_readonly("count", &Clusters::count)
        .def_property_readonly("nbytes", &Clusters::nbytes)
        .def("pack", &py_pack, py::arg("first"), py::arg("last"), "Keeps the vectors of some clusters packed in memory.")
        .def("search_nearest", &py_search_nearest, py::arg("queries"), py::arg("excluded"), py::arg("k"),
             py::arg("margin") = 1.0f,
             "Searches each query in the nearest cluster: squared distances, ids, the clusters, and what was looked at.")
        .def("search", &py_search, py::arg("range"), py::arg("queries"), py::arg("excluded"), py::arg("bound"), py::arg("seed"),
             py::arg("k"), py::arg("margin") = 1.0f,
             "Searches each query in the other clusters of a range: squared distances, ids, and what was looked at.");
}

}  // namespace spade
