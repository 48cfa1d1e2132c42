// The extension module spade_faiss.search.native._native. Arguments are checked here; computing runs without the GIL.
#include "module.hpp"

#include <cmath>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "arguments.hpp"
#include "search.hpp"

namespace spade {
namespace {

// Whether all rows are of length 1 and at right angles, as far as float32 can tell: the filter's bound relies on it.
bool is_orthonormal(const float* basis, int components, int d) {
    for (int a = 0; a < components; ++a)
        for (int b = 0; b <= a; ++b) {
            const float *row_a = basis + static_cast<std::size_t>(a) * d, *row_b = basis + static_cast<std::size_t>(b) * d;
            double product = 0;
            for (int i = 0; i < d; ++i) product += static_cast<double>(row_a[i]) * row_b[i];
            if (!(std::abs(product - (a == b)) <= 1e-6)) return false;
        }
    return true;
}

LevelPacking make_packing(const std::string& simd_level, const py::array& center, const std::optional<py::array>& basis,
                          float longest) {
    const SimdLevel& level = level_of(simd_level);
    require(level.why_not.empty(), "SIMD level " + simd_level + " does not run here: " + level.why_not);
    require(center.ndim() == 1 && center.shape(0) > 0 && center.shape(0) <= kMostChannels, "center must be (1 to 65536,)");
    const int d = static_cast<int>(center.shape(0));
    const float* origin = floats_of(center, {d}, "center must be (d,)");
    require(longest >= 0 && std::isfinite(longest), "longest must be 0 or more, and finite");
    const float unit = longest / static_cast<float>(level.format.max_query_code);
    if (!basis) return {&level, std::make_shared<Packing>(level.format, d, origin, nullptr, 0, unit)};
    require(basis->ndim() == 2 && basis->shape(0) > 0 && basis->shape(0) < d, "basis must be (fewer than d, d)");
    const int components = static_cast<int>(basis->shape(0));
    const float* rows = floats_of(*basis, {components, d}, "basis must be (fewer than d, d)");
    require(is_orthonormal(rows, components, d), "basis must be of orthonormal rows");
    return {&level, std::make_shared<Packing>(level.format, d, origin, rows, components, unit)};
}

// What Python sees as RowPack and QueryPack: a pack, and the SIMD level that it is for.
template <typename Pack>
struct LevelPack {
    LevelPack(const LevelPacking& by, const Vectors& vectors) : level(by.level), pack(by.packing, vectors) {}
    const SimdLevel* level;
    Pack pack;
};

template <typename Pack>
std::unique_ptr<LevelPack<Pack>> make_pack(const LevelPacking& packing, const py::array& array, const StoredCodes* codes) {
    const Vectors vectors = stored_of(array, codes, "vectors");
    require(vectors.d == packing.packing->d, "vectors must have the packing's channels");
    const py::gil_scoped_release released;
    return std::make_unique<LevelPack<Pack>>(packing, vectors);
}

void require_one_packing(const LevelPack<QueryPack>& queries, const LevelPack<RowPack>& rows) {
    require(queries.pack.packing == rows.pack.packing, "packs must be made by one packing");
}

py::tuple py_search(const LevelPack<QueryPack>& query_pack, const py::array& queries, const LevelPack<RowPack>& row_pack,
                    const py::array& rows, const py::array& bound, int k, float margin, const StoredCodes* codes) {
    require_one_packing(query_pack, row_pack);
    const Vectors xq = vectors_of(queries, "queries"), xb = stored_of(rows, codes, "rows");
    require(xq.count == query_pack.pack.count && xb.count == row_pack.pack.count && xq.d == query_pack.pack.packing->d &&
                xb.d == xq.d,
            "packs must be of these queries and rows");
    require(xq.type == ElementType::kFloat32 && is_aligned(xq.data), "queries must be float32, aligned");
    require(1 <= k && k <= xb.count, "k must be 1 to the number of rows");
    const float* limit = floats_of(bound, {xq.count}, "bound must be (" + std::to_string(xq.count) + ",)");
    py::array_t<float> D({static_cast<py::ssize_t>(xq.count), static_cast<py::ssize_t>(k)});
    py::array_t<std::int64_t> I({static_cast<py::ssize_t>(xq.count), static_cast<py::ssize_t>(k)});
    float* sq_dist = D.mutable_data();
    std::int64_t* row = I.mutable_data();
    SearchStats stats;
    {
        const py::gil_scoped_release released;
        stats = search(*query_pack.level, query_pack.pack, xq, row_pack.pack, xb, limit, k, margin, sq_dist, row);
    }
    return py::make_tuple(std::move(D), std::move(I), stats.evaluated, stats.dense);
}

void py_filter(const LevelPack<QueryPack>& query_pack, const LevelPack<RowPack>& row_pack) {
    require_one_packing(query_pack, row_pack);
    const py::gil_scoped_release released;
    filter_block(*query_pack.level, query_pack.pack, row_pack.pack);
}

std::vector<std::pair<std::string, std::string>> py_simd_levels() {
    std::vector<std::pair<std::string, std::string>> found;
    for (const SimdLevel& level : simd_levels()) found.emplace_back(level.name, level.why_not);
    return found;
}

int py_padded_length(const std::string& simd_level, int length, bool digits) {
    return round_up(length + (digits ? kLeastDigits : 0), level_of(simd_level).format.alignment);
}

// `scale`: (d,). `bits`: (d,) uint8, from 1 to 7; None for codes of a byte each.
std::unique_ptr<StoredCodes> make_codes(const py::array& scale, const std::optional<py::array>& bits) {
    require(scale.ndim() == 1 && scale.shape(0) > 0 && scale.shape(0) <= kMostChannels, "scale must be 1 to 65536 numbers");
    const float* scales = floats_of(scale, {scale.shape(0)}, "scale must be (d,)");
    const std::uint8_t* counts = nullptr;
    if (bits) {
        require(bits->dtype().equal(py::dtype::of<std::uint8_t>()) && bits->ndim() == 1 && bits->shape(0) == scale.shape(0) &&
                    is_contiguous(*bits),
                "bits must be (d,) uint8, C-contiguous");
        counts = static_cast<const std::uint8_t*>(bits->data());
        for (py::ssize_t i = 0; i < bits->shape(0); ++i)
            require(1 <= counts[i] && counts[i] <= kMostCodeBits, "bits must be from 1 to 7");
    }
    return std::make_unique<StoredCodes>(static_cast<int>(scale.shape(0)), scales, counts);
}

template <typename Pack>
void define_pack(py::module_& module, const char* name) {
    py::class_<LevelPack<Pack>>(module, name)
        .def(py::init(&make_pack<Pack>), py::arg("packing"), py::arg("vectors"), py::arg("codes") = py::none())
        .def_property_readonly("nbytes", [](const LevelPack<Pack>& self) { return self.pack.nbytes(); });
}

}  // namespace
}  // namespace spade

PYBIND11_MODULE(_native, module) {
    using namespace spade;
    module.doc() = "Exact nearest rows by a filter of small integers; see spade_faiss.search.native.extension.";
    module.attr("MOST_CHANNELS") = kMostChannels;
    module.def("simd_levels", &py_simd_levels, "Each SIMD level, and why it does not run here; the fastest first.");
    module.def("padded_length", &py_padded_length, py::arg("simd_level"), py::arg("length"), py::arg("digits") = false,
               "The number of codes that vectors of this many values take, with digits or without.");
    py::class_<LevelPacking>(module, "Packing")
        .def(py::init(&make_packing), py::arg("simd_level"), py::arg("center"), py::arg("basis") = py::none(),
             py::arg("longest") = 0.0f);
    py::class_<StoredCodes>(module, "StoredCodes").def(py::init(&make_codes), py::arg("scale"), py::arg("bits") = py::none());
    define_pack<RowPack>(module, "RowPack");
    define_pack<QueryPack>(module, "QueryPack");
    module.def("search", &py_search, py::arg("query_pack"), py::arg("queries"), py::arg("row_pack"), py::arg("rows"),
               py::arg("bound"), py::arg("k"), py::arg("margin") = 1.0f, py::arg("codes") = py::none(),
               "The k nearest rows of each query: squared distances, rows, and how many distances were computed.");
    define_gallery(module);
    define_clusters(module);
    define_k_center(module);
    define_lists(module);
    define_resample(module);
    define_windows(module);
    module.def("filter", &py_filter, py::arg("query_pack"), py::arg("row_pack"),
               "Runs the filter alone, to measure its speed.");
}
