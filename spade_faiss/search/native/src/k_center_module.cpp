// Python's k_center: arguments are checked here, computing runs without the GIL.
#include "arguments.hpp"
#include "k_center.hpp"
#include "module.hpp"

namespace spade {
namespace {

py::tuple py_k_center(const py::array& vectors, int count, int first, const py::array& shadows, float slack, int threads) {
    const Vectors xb = vectors_of(vectors, "vectors");
    require(1 <= count && count <= xb.count, "count must be 1 to the number of vectors");
    require(0 <= first && first < xb.count, "first must be one of the vectors");
    const float* shadow = floats_of(shadows, {xb.count, kShadow}, "shadows must be (n, " + std::to_string(kShadow) + ")");
    require(1 <= threads && threads <= 1024, "threads must be 1 to 1024");
    require(slack >= 0, "slack must not be negative");
    KCenter found;
    {
        const py::gil_scoped_release released;
        found = k_center(xb, count, first, shadow, slack, threads);
    }
    const auto size = static_cast<py::ssize_t>(found.picks.size());
    return py::make_tuple(py::array_t<std::int64_t>(size, found.picks.data()), found.sq_radius);
}

}  // namespace

void define_k_center(py::module_& module) {
    module.attr("SHADOW") = kShadow;
    module.def("k_center", &py_k_center, py::arg("vectors"), py::arg("count"), py::arg("first"), py::arg("shadows"),
               py::arg("slack"), py::arg("threads") = 1,
               "Greedy k-center over vectors (n, d): the picks (count,), and the squared radius that they cover all with.");
}

}  // namespace spade
