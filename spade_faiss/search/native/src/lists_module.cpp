// Python's Lists: arguments are checked here, computing runs without the GIL.
#include <memory>
#include <string>
#include <tuple>
#include <utility>

#include "arguments.hpp"
#include "gallery_module.hpp"
#include "lists.hpp"
#include "module.hpp"

namespace spade {
namespace {

// What is read beyond the last row, see `RowCodes`.
constexpr py::ssize_t kBeyond = 64;

template <typename T>
const T* numbers_of(const py::array& array, py::ssize_t count, const std::string& name) {
    require(array.dtype().equal(py::dtype::of<T>()) && array.ndim() == 1 && array.shape(0) == count && is_contiguous(array) &&
                reinterpret_cast<std::uintptr_t>(array.data()) % alignof(T) == 0,
            name + " must be of " + std::to_string(count) + " numbers, C-contiguous and aligned");
    return static_cast<const T*>(array.data());
}

// Lists, and the arrays that they point into.
struct OwnedLists {
    std::unique_ptr<Lists> lists;
    py::list arrays;
};

// `groups`: of each group of images, the arrays codes, step, half_sq_norm, id, sizes of the lists, and bank rows of the images.
std::unique_ptr<OwnedLists> make_lists(const std::string& simd_level, const OwnedGallery& owned, const py::array& centroids,
                                       const py::list& groups) {
    const SimdLevel& level = level_of(simd_level);
    require(level.why_not.empty(), "SIMD level " + simd_level + " does not run here: " + level.why_not);
    const Vectors vectors = vectors_of(centroids, "centroids");
    require(vectors.type == ElementType::kFloat32 && is_aligned(vectors.data) && vectors.count > 0,
            "centroids must be (1 or more, width) float32, aligned");
    const int stride = round_up(vectors.d, kRowAlign);
    const std::int64_t images = owned.gallery.count / owned.gallery.locations;
    auto made = std::make_unique<OwnedLists>();
    std::vector<ListCodes> all;
    for (const py::handle& item : groups) {
        const auto arrays = item.cast<std::tuple<py::array, py::array, py::array, py::array, py::array, py::array>>();
        const auto& [codes, step, half_sq_norm, id, sizes, rows] = arrays;
        ListCodes group;
        group.starts.push_back(0);
        const std::uint32_t* size = numbers_of<std::uint32_t>(sizes, vectors.count, "sizes");
        for (int list = 0; list < vectors.count; ++list) {
            require(size[list] < (1u << 28), "lists must be shorter than 2^28");
            group.starts.push_back(group.starts.back() + round_up(static_cast<int>(size[list]), kRowAlign));
        }
        const std::int64_t padded = group.starts.back();
        group.rows = {numbers_of<std::uint8_t>(codes, padded * stride + kBeyond, "codes"),
                      numbers_of<float>(step, padded, "step"), numbers_of<float>(half_sq_norm, padded, "half_sq_norm"), stride};
        group.id = numbers_of<std::uint32_t>(id, padded, "id");
        const std::int64_t* row = numbers_of<std::int64_t>(rows, rows.size(), "rows");
        for (py::ssize_t image = 0; image < rows.size(); ++image) {
            require(-1 <= row[image] && row[image] < images, "rows must be those of the gallery, or -1");
            group.images.push_back(row[image]);
        }
        all.push_back(std::move(group));
        made->arrays.append(item);
    }
    made->lists = std::make_unique<Lists>(level, owned.gallery, vectors, std::move(all));
    return made;
}

py::tuple py_search(const OwnedLists& owned, const py::array& queries, const py::array& projected, const py::list& allowed,
                    int nprobe, int rerank, int k) {
    const Lists& lists = *owned.lists;
    ListQueries asked{vectors_of(queries, "queries"), vectors_of(projected, "projected"), {}, nprobe, rerank};
    require(asked.xq.type == ElementType::kFloat32 && is_aligned(asked.xq.data) && asked.xq.d == lists.gallery().d,
            "queries must be float32, aligned, with the channels of the gallery");
    require(asked.projected.type == ElementType::kFloat32 && is_aligned(asked.projected.data) &&
                asked.projected.d == lists.width() && asked.projected.count == asked.xq.count,
            "projected must be float32, aligned, with the width of the centroids");
    require(nprobe >= 1 && k >= 1 && rerank >= k, "nprobe and k must be 1 or more, rerank k or more");
    require(allowed.size() == lists.groups().size(), "allowed must be an array for each group");
    for (std::size_t number = 0; number < allowed.size(); ++number) {
        const auto images = static_cast<py::ssize_t>(lists.groups()[number].images.size());
        const auto* of_group = numbers_of<bool>(allowed[number].cast<py::array>(), images, "allowed");
        for (py::ssize_t image = 0; image < images; ++image)
            require(!of_group[image] || lists.groups()[number].images[image] >= 0, "allowed images must have a row");
        asked.allowed.push_back(reinterpret_cast<const std::uint8_t*>(of_group));
    }
    py::array_t<float> D({static_cast<py::ssize_t>(asked.xq.count), static_cast<py::ssize_t>(k)});
    py::array_t<std::int64_t> I({static_cast<py::ssize_t>(asked.xq.count), static_cast<py::ssize_t>(k)});
    float* sq_dist = D.mutable_data();
    std::int64_t* id = I.mutable_data();
    ListStats stats;
    {
        const py::gil_scoped_release released;
        stats = search_lists(lists, asked, k, sq_dist, id);
    }
    require(!stats.is_damaged, "ids must be those of vectors");
    return py::make_tuple(std::move(D), std::move(I), stats.looked_at);
}

}  // namespace

void define_lists(py::module_& module) {
    py::class_<OwnedLists>(module, "Lists")
        .def(py::init(&make_lists), py::arg("simd_level"), py::arg("gallery"), py::arg("centroids"), py::arg("groups"),
             py::keep_alive<1, 3>())
        .def("search", &py_search, py::arg("queries"), py::arg("projected"), py::arg("allowed"), py::arg("nprobe"),
             py::arg("rerank"), py::arg("k"),
             "Searches queries in the lists of the nearest centroids: squared distances, ids, and how many codes were read.");
}

}  // namespace spade
