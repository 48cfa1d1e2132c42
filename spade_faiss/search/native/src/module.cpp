// spade_faiss.search.native._native: the kernel as `spade_faiss/search/native/extension.py` sees it. Arrays are checked here, computing runs without the GIL.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cmath>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "search.hpp"

namespace py = pybind11;

namespace spade {
namespace {

void require(bool holds, const std::string& what) {
    if (!holds) throw py::value_error(what);
}

bool is_contiguous(const py::array& array) { return array.flags() & py::array::c_style; }

// (n, d) float16 or float32, as they lie in memory.
Vectors vectors_of(const py::array& array, const char* name) {
    const bool single = array.dtype().equal(py::dtype::of<float>()), half = array.dtype().equal(py::dtype("e"));
    require((single || half) && array.ndim() == 2 && is_contiguous(array),
            std::string(name) + " must be (n, d) float16 or float32, C-contiguous");
    require(array.shape(1) > 0 && array.shape(1) <= kMostChannels, std::string(name) + " must have 1 to 65536 channels");
    require(array.shape(0) < (1 << 28), std::string(name) + " are too many");
    return {array.data(), half ? Type::kFloat16 : Type::kFloat32, static_cast<int>(array.shape(0)),
            static_cast<int>(array.shape(1))};
}

const float* floats_of(const py::array& array, const std::vector<py::ssize_t>& shape, const std::string& what) {
    bool same = array.ndim() == static_cast<py::ssize_t>(shape.size());
    for (std::size_t axis = 0; same && axis < shape.size(); ++axis) same = array.shape(axis) == shape[axis];
    require(same && array.dtype().equal(py::dtype::of<float>()) && is_contiguous(array) &&
                reinterpret_cast<std::uintptr_t>(array.data()) % alignof(float) == 0,
            what + " float32, C-contiguous and aligned");
    return static_cast<const float*>(array.data());
}

// A packing, and the unit that it is for.
struct UnitPacking {
    const Unit* unit;
    std::shared_ptr<const Packing> packing;
};

// Every pair of rows, to what float32 holds: exactness rests on it.
bool is_orthonormal(const float* basis, int components, int d) {
    for (int a = 0; a < components; ++a)
        for (int b = 0; b <= a; ++b) {
            double product = 0;
            for (int i = 0; i < d; ++i)
                product += static_cast<double>(basis[static_cast<std::size_t>(a) * d + i]) * basis[static_cast<std::size_t>(b) * d + i];
            if (!(std::abs(product - (a == b)) <= 1e-6)) return false;
        }
    return true;
}

UnitPacking make_packing(const std::string& name, const py::array& center, const std::optional<py::array>& basis) {
    const Unit* unit = find_unit(name);
    require(unit != nullptr, "there is no unit '" + name + "'");
    require(unit->why_not.empty(), "unit " + name + " cannot run here: " + unit->why_not);
    require(center.ndim() == 1 && center.shape(0) > 0 && center.shape(0) <= kMostChannels, "center must be (1 to 65536,)");
    const int d = static_cast<int>(center.shape(0));
    const float* at = floats_of(center, {d}, "center must be (d,)");
    if (!basis) return {unit, std::make_shared<Packing>(unit->format, d, at, nullptr, 0)};
    require(basis->ndim() == 2 && basis->shape(0) > 0 && basis->shape(0) < d, "basis must be (fewer than d, d)");
    const int components = static_cast<int>(basis->shape(0));
    const float* rows = floats_of(*basis, {components, d}, "basis must be (fewer than d, d)");
    require(is_orthonormal(rows, components, d), "basis must be of orthonormal rows");
    return {unit, std::make_shared<Packing>(unit->format, d, at, rows, components)};
}

// A pack, with the unit that it is for.
template <typename Pack>
struct UnitPack {
    UnitPack(const UnitPacking& by, const Vectors& vectors) : unit(by.unit), pack(by.packing, vectors) {}
    const Unit* unit;
    Pack pack;
};

template <typename Pack>
std::unique_ptr<UnitPack<Pack>> make_pack(const UnitPacking& by, const py::array& array) {
    const Vectors vectors = vectors_of(array, "vectors");
    require(vectors.d == by.packing->d, "vectors must have the packing's channels");
    const py::gil_scoped_release released;
    return std::make_unique<UnitPack<Pack>>(by, vectors);
}

void require_together(const UnitPack<QueryPack>& queries, const UnitPack<RowPack>& rows) {
    require(queries.pack.packing == rows.pack.packing, "packs must be made by one packing");
}

py::tuple search_block(const UnitPack<QueryPack>& queries, const py::array& xq_, const UnitPack<RowPack>& rows, const py::array& xb_,
                       const py::array& bound, int k, float margin) {
    require_together(queries, rows);
    const Vectors xq = vectors_of(xq_, "queries"), xb = vectors_of(xb_, "rows");
    require(xq.count == queries.pack.count && xb.count == rows.pack.count && xq.d == queries.pack.packing->d && xb.d == xq.d,
            "packs must be of these queries and rows");
    require(xq.type == Type::kFloat32 && reinterpret_cast<std::uintptr_t>(xq.data) % alignof(float) == 0,
            "queries must be float32, aligned");
    require(1 <= k && k <= xb.count, "k must be 1 to the number of rows");
    const float* limit = floats_of(bound, {xq.count}, "bound must be (" + std::to_string(xq.count) + ",)");
    py::array_t<float> sq_dist({static_cast<py::ssize_t>(xq.count), static_cast<py::ssize_t>(k)});
    py::array_t<std::int64_t> location({static_cast<py::ssize_t>(xq.count), static_cast<py::ssize_t>(k)});
    float* D = sq_dist.mutable_data();
    std::int64_t* I = location.mutable_data();
    Effort effort;
    {
        const py::gil_scoped_release released;
        effort = search(*queries.unit, queries.pack, xq, rows.pack, xb, limit, k, margin, D, I);
    }
    return py::make_tuple(std::move(sq_dist), std::move(location), effort.evaluated, effort.dense);
}

// What a filter alone does, for measuring it: minima that nobody looks at.
void filter_block(const UnitPack<QueryPack>& queries, const UnitPack<RowPack>& rows) {
    require_together(queries, rows);
    const py::gil_scoped_release released;
    filter_all(*queries.unit, queries.pack, rows.pack);
}

std::vector<std::pair<std::string, std::string>> list_units() {
    std::vector<std::pair<std::string, std::string>> found;
    for (const Unit& unit : units()) found.emplace_back(unit.name, unit.why_not);
    return found;
}

int padded_length(const std::string& name, int length) {
    const Unit* unit = find_unit(name);
    require(unit != nullptr, "there is no unit '" + name + "'");
    return (length + unit->format.align - 1) / unit->format.align * unit->format.align;
}

template <typename Pack>
void expose(py::module_& module, const char* name) {
    py::class_<UnitPack<Pack>>(module, name)
        .def(py::init(&make_pack<Pack>), py::arg("packing"), py::arg("vectors"))
        .def_property_readonly("nbytes", [](const UnitPack<Pack>& of) { return of.pack.nbytes(); });
}

}  // namespace
}  // namespace spade

PYBIND11_MODULE(_native, module) {
    using namespace spade;
    module.doc() = "Exact nearest rows by a filter of small integers; see spade_faiss.kernel.";
    module.attr("MOST_CHANNELS") = kMostChannels;
    module.def("units", &list_units, "Each unit, and why it does not run here; the fastest first.");
    module.def("padded_length", &padded_length, py::arg("unit"), py::arg("length"));
    py::class_<UnitPacking>(module, "Packing")
        .def(py::init(&make_packing), py::arg("unit"), py::arg("center"), py::arg("basis") = py::none());
    expose<RowPack>(module, "RowPack");
    expose<QueryPack>(module, "QueryPack");
    module.def("search", &search_block, py::arg("query_pack"), py::arg("queries"), py::arg("row_pack"), py::arg("rows"),
               py::arg("bound"), py::arg("k"), py::arg("margin") = 1.0f);
    module.def("filter", &filter_block, py::arg("query_pack"), py::arg("row_pack"));
}
