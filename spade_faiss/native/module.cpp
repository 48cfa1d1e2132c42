// spade_faiss._native: the kernel as `spade_faiss/kernel.py` sees it. Arrays are checked here, computing runs without the GIL.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>
#include <stdexcept>
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

// (n, d) float16 or float32, as they lie in memory.
Vectors vectors_of(const py::array& array, const char* name) {
    const bool is_float = array.dtype().kind() == 'f' && (array.itemsize() == 2 || array.itemsize() == 4);
    require(is_float && array.ndim() == 2 && (array.flags() & py::array::c_style),
            std::string(name) + " must be (n, d) float16 or float32, C-contiguous");
    require(array.shape(1) > 0 && array.shape(1) <= kMostChannels && array.shape(0) < (1 << 30),
            std::string(name) + " must have 1 to 65536 channels");
    return {array.data(), array.itemsize() == 2 ? Type::kFloat16 : Type::kFloat32, static_cast<int>(array.shape(0)),
            static_cast<int>(array.shape(1))};
}

const float* floats_of(const py::array& array, py::ssize_t size, const char* name) {
    require(array.dtype().kind() == 'f' && array.itemsize() == 4 && array.ndim() == 1 && array.shape(0) == size &&
                (array.flags() & py::array::c_style) && reinterpret_cast<std::uintptr_t>(array.data()) % 4 == 0,
            std::string(name) + " must be (" + std::to_string(size) + ",) float32, C-contiguous and aligned");
    return static_cast<const float*>(array.data());
}

const Unit& unit_of(const std::string& name) {
    const Unit* unit = find_unit(name);
    require(unit != nullptr, "there is no unit '" + name + "'");
    if (!unit->why_not.empty()) throw std::runtime_error("unit " + name + " cannot run here: " + unit->why_not);
    return *unit;
}

bool same(const Format& a, const Format& b) {
    return a.row_most == b.row_most && a.zero == b.zero && a.query_most == b.query_most && a.align == b.align;
}

template <typename Pack>
Pack* pack(const std::string& unit, const py::array& vectors, const py::array& centre, const std::optional<py::array>& basis) {
    const Format format = unit_of(unit).format;
    const Vectors of = vectors_of(vectors, "vectors");
    Shape shape{floats_of(centre, of.d, "centre"), nullptr, of.d, 0};
    if (basis) {
        const Vectors rows = vectors_of(*basis, "basis");
        require(rows.type == Type::kFloat32 && rows.d == of.d && rows.count > 0 && rows.count < of.d,
                "basis must be (fewer than d, d) float32");
        shape.basis = static_cast<const float*>(rows.data);
        shape.components = rows.count;
    }
    const py::gil_scoped_release released;
    return new Pack(of, shape, format);
}

py::tuple search_block(const std::string& unit_name, const QueryPack& query_pack, const py::array& queries, const RowPack& row_pack,
                       const py::array& rows, const py::array& bound, int k, float margin) {
    const Unit& unit = unit_of(unit_name);
    const Vectors xq = vectors_of(queries, "queries"), xb = vectors_of(rows, "rows");
    require(same(query_pack.format, unit.format) && same(row_pack.format, unit.format), "packs must be of the unit that searches");
    require(query_pack.stride == row_pack.stride, "packs must be made with one basis");
    require(xq.type == Type::kFloat32 && reinterpret_cast<std::uintptr_t>(xq.data) % 4 == 0, "queries must be float32, aligned");
    require(xq.count == query_pack.count && xb.count == row_pack.count && xq.d == query_pack.d && xb.d == row_pack.d &&
                xq.d == xb.d,
            "packs must be of these queries and rows");
    require(1 <= k && k <= xb.count, "k must be 1 to the number of rows");
    const float* limit = floats_of(bound, xq.count, "bound");
    py::array_t<float> sq_dist({static_cast<py::ssize_t>(xq.count), static_cast<py::ssize_t>(k)});
    py::array_t<std::int64_t> location({static_cast<py::ssize_t>(xq.count), static_cast<py::ssize_t>(k)});
    float* D = sq_dist.mutable_data();
    std::int64_t* I = location.mutable_data();
    Effort effort;
    {
        const py::gil_scoped_release released;
        effort = search(unit, query_pack, xq, row_pack, xb, limit, k, margin, D, I);
    }
    return py::make_tuple(std::move(sq_dist), std::move(location), effort.evaluated, effort.dense);
}

// What a filter alone does, for measuring it: minima that nobody looks at.
void filter_block(const std::string& unit_name, const QueryPack& query_pack, const RowPack& row_pack) {
    const Unit& unit = unit_of(unit_name);
    require(same(query_pack.format, unit.format) && same(row_pack.format, unit.format), "packs must be of the unit that searches");
    require(query_pack.stride == row_pack.stride, "packs must be made with one basis");
    const py::gil_scoped_release released;
    filter_all(unit, query_pack, row_pack);
}

std::vector<std::pair<std::string, std::string>> list_units() {
    std::vector<std::pair<std::string, std::string>> found;
    for (const Unit& unit : units()) found.emplace_back(unit.name, unit.why_not);
    return found;
}

template <typename Pack>
void expose(py::module_& module, const char* name) {
    py::class_<Pack>(module, name)
        .def(py::init(&pack<Pack>), py::arg("unit"), py::arg("vectors"), py::arg("centre"), py::arg("basis") = py::none())
        .def_property_readonly("nbytes", &Pack::nbytes);
}

}  // namespace
}  // namespace spade

PYBIND11_MODULE(_native, module) {
    using namespace spade;
    module.doc() = "Exact nearest rows by a filter of small integers; see spade_faiss.kernel.";
    module.attr("PANEL") = kPanel;
    module.def("units", &list_units, "Each unit, and why it does not run here; the fastest first.");
    expose<RowPack>(module, "RowPack");
    expose<QueryPack>(module, "QueryPack");
    module.def("search", &search_block, py::arg("unit"), py::arg("query_pack"), py::arg("queries"),
               py::arg("row_pack"), py::arg("rows"), py::arg("bound"), py::arg("k"), py::arg("margin") = 1.0f);
    module.def("filter", &filter_block, py::arg("unit"), py::arg("query_pack"), py::arg("row_pack"));
}
