package detect

import (
	"fmt"
	"image"
	"math"
	"math/rand/v2"

	"golang.org/x/image/draw"

	"github.com/lathe-ml/lathe/data"
	"github.com/lathe-ml/lathe/internal/rng"
)

// Object is one labelled object of a scene.
type Object struct {
	Class int  // from 0
	Box   Rect // in pixels of the scene
}

// Scene is a picture with its labelled objects.
type Scene struct {
	Pixels  []float32 // [height, width, channels] in [0, 1]
	Objects []Object
}

// SceneFrom makes a scene of a picture of any size: it is scaled to height x width (the aspect ratio is not kept) and
// read as grey (1 channel) or RGB (3 channels); the objects, given in pixels of the picture, are scaled with it.
func SceneFrom(img image.Image, objects []Object, height, width, channels int) (Scene, error) {
	if img == nil || img.Bounds().Empty() {
		return Scene{}, fmt.Errorf("detect: the picture is empty")
	}
	if height < 1 || width < 1 || channels != 1 && channels != 3 {
		return Scene{}, fmt.Errorf("detect: want a scene of at least 1x1 with 1 or 3 channels, got %dx%dx%d", height, width, channels)
	}
	scaled := image.NewNRGBA(image.Rect(0, 0, width, height))
	draw.CatmullRom.Scale(scaled, scaled.Bounds(), img, img.Bounds(), draw.Src, nil)
	s := Scene{Pixels: make([]float32, height*width*channels)}
	for i := range height * width {
		p := scaled.Pix[4*i : 4*i+3]
		if channels == 3 {
			for c := range 3 {
				s.Pixels[3*i+c] = float32(p[c]) / 255
			}
			continue
		}
		s.Pixels[i] = (0.299*float32(p[0]) + 0.587*float32(p[1]) + 0.114*float32(p[2])) / 255 // BT.601 luma
	}
	kx, ky := float64(width)/float64(img.Bounds().Dx()), float64(height)/float64(img.Bounds().Dy())
	for _, o := range objects {
		o.Box = Rect{o.Box.X * kx, o.Box.Y * ky, o.Box.W * kx, o.Box.H * ky}
		s.Objects = append(s.Objects, o)
	}
	return s, nil
}

// Ground returns the objects of the scenes as ground truth; the image id is the place of the scene.
func Ground(scenes []Scene) []GroundTruth {
	var gt []GroundTruth
	for i, s := range scenes {
		for _, o := range s.Objects {
			gt = append(gt, GroundTruth{ID: len(gt) + 1, Image: i, Class: o.Class, Box: o.Box})
		}
	}
	return gt
}

// SceneConfig says how Scenes composes pictures of single items. Its zero value is the crowded set of 96x96 pixels.
type SceneConfig struct {
	// Size is the height and width. If it is 0, it is defaulted to 96.
	Size int
	// MinObjects and MaxObjects bound the number of objects, drawn uniformly. If 0, they are defaulted to 6 and 12,
	// or 3 and 5 in a sparse scene.
	MinObjects, MaxObjects int
	// MinItem and MaxItem bound the side that an item's picture is scaled to. If 0, they are defaulted to 20 and 36.
	MinItem, MaxItem int
	// Sparse places every object by itself, with an IoU below 0.05 to every other one. Otherwise half of the objects
	// come in pairs of one class whose boxes overlap with an IoU drawn uniformly from [0.3, 0.65], and every two
	// objects that are no pair have an IoU below 0.1.
	Sparse bool
}

func (c SceneConfig) resolved() (SceneConfig, error) {
	def := func(v *int, d int) {
		if *v == 0 {
			*v = d
		}
	}
	def(&c.Size, 96)
	if c.Sparse {
		def(&c.MinObjects, 3)
		def(&c.MaxObjects, 5)
	} else {
		def(&c.MinObjects, 6)
		def(&c.MaxObjects, 12)
	}
	def(&c.MinItem, 20)
	def(&c.MaxItem, 36)
	switch {
	case c.MinObjects < 1 || c.MaxObjects < c.MinObjects:
		return c, fmt.Errorf("detect: scenes of %d to %d objects; want at least 1 and a rising range", c.MinObjects, c.MaxObjects)
	case c.MinItem < 4 || c.MaxItem < c.MinItem || c.MaxItem > c.Size:
		return c, fmt.Errorf("detect: items of %d to %d pixels in scenes of %d; want 4 <= smallest <= largest <= scene", c.MinItem, c.MaxItem, c.Size)
	}
	return c, nil
}

// Scenes composes n scenes of items (grey pictures of single things on black, such as Fashion-MNIST), each scaled and
// pasted by the brighter of the two pixels. An object's box is the tight bound of its item, hidden parts included. The
// same seed gives the same scenes, whatever n.
func Scenes(items *data.Images, n int, cfg SceneConfig, seed uint64) ([]Scene, error) {
	cfg, err := cfg.resolved()
	if err != nil {
		return nil, err
	}
	if items == nil || items.N == 0 || items.C != 1 {
		return nil, fmt.Errorf("detect: want at least one grey item to compose scenes of")
	}
	byClass := make([][]int, items.Classes())
	for i, l := range items.Labels {
		byClass[l] = append(byClass[l], i)
	}
	scenes := make([]Scene, n)
	errs := make([]error, n)
	parallel(n, 0, func(i int) {
		r := rng.New(seed, fmt.Sprintf("scene/%d", i))
		for range 100 {
			if s, ok := cfg.compose(r, items, byClass); ok {
				scenes[i] = s
				return
			}
		}
		errs[i] = fmt.Errorf("detect: found no room for %d to %d items of %d to %d pixels in scenes of %d",
			cfg.MinObjects, cfg.MaxObjects, cfg.MinItem, cfg.MaxItem, cfg.Size)
	})
	for _, err := range errs {
		if err != nil {
			return nil, err
		}
	}
	return scenes, nil
}

// item is a scaled picture cut to its tight bounds.
type item struct {
	class, w, h int
	pix         []float32
}

func (c SceneConfig) draw(r *rand.Rand, items *data.Images, from []int) (item, bool) {
	k := from[r.IntN(len(from))]
	side := c.MinItem + r.IntN(c.MaxItem-c.MinItem+1)
	pix := resize(items.At(k), items.H, items.W, side)
	x0, y0, x1, y1 := side, side, -1, -1
	for y := range side {
		for x := range side {
			if pix[y*side+x] > 0 {
				x0, y0, x1, y1 = min(x0, x), min(y0, y), max(x1, x), max(y1, y)
			}
		}
	}
	if x1-x0 < 3 || y1-y0 < 3 {
		return item{}, false
	}
	it := item{class: int(items.Labels[k]), w: x1 - x0 + 1, h: y1 - y0 + 1}
	for y := y0; y <= y1; y++ {
		it.pix = append(it.pix, pix[y*side+x0:y*side+x1+1]...)
	}
	return it, true
}

// resize scales a picture to side x side, bilinear with half-pixel centres, and to [0, 1].
func resize(src []uint8, h, w, side int) []float32 {
	out := make([]float32, side*side)
	at := func(i, from int) (int, int, float32) {
		p := max((float64(i)+0.5)*float64(from)/float64(side)-0.5, 0)
		lo := int(p)
		return min(lo, from-1), min(lo+1, from-1), float32(p - float64(lo))
	}
	for y := range side {
		y0, y1, fy := at(y, h)
		for x := range side {
			x0, x1, fx := at(x, w)
			top := float32(src[y0*w+x0])*(1-fx) + float32(src[y0*w+x1])*fx
			bottom := float32(src[y1*w+x0])*(1-fx) + float32(src[y1*w+x1])*fx
			out[y*side+x] = (top*(1-fy) + bottom*fy) / 255
		}
	}
	return out
}

// compose tries once.
func (c SceneConfig) compose(r *rand.Rand, items *data.Images, byClass [][]int) (Scene, bool) {
	s := Scene{Pixels: make([]float32, c.Size*c.Size)}
	n := c.MinObjects + r.IntN(c.MaxObjects-c.MinObjects+1)
	pairs, apart := int(math.Round(float64(n)/4)), 0.1 // half of the objects
	if c.Sparse {
		pairs, apart = 0, 0.05
	}
	any := func() (item, bool) {
		class := byClass[r.IntN(len(byClass))]
		if len(class) == 0 {
			return item{}, false
		}
		return c.draw(r, items, class)
	}
	free := func(b Rect) bool {
		for _, o := range s.Objects {
			if IoU(b.Corners(), o.Box.Corners(), false) >= apart {
				return false
			}
		}
		return true
	}
	paste := func(it item, b Rect) {
		x0, y0 := int(b.X), int(b.Y)
		for y := range it.h {
			row := s.Pixels[(y0+y)*c.Size+x0:]
			for x := range it.w {
				row[x] = max(row[x], it.pix[y*it.w+x])
			}
		}
		s.Objects = append(s.Objects, Object{it.class, b})
	}
	anywhere := func(it item) Rect {
		return Rect{float64(r.IntN(c.Size - it.w + 1)), float64(r.IntN(c.Size - it.h + 1)), float64(it.w), float64(it.h)}
	}
	const tries = 200
	for range pairs {
		placed, want := false, 0.3+0.35*r.Float64()
		for try := 0; try < tries && !placed; try++ {
			a, ok := any()
			if !ok {
				continue
			}
			b, ok := c.draw(r, items, byClass[a.class])
			if !ok {
				continue
			}
			first := anywhere(a)
			second, ok := c.beside(r, first, b, want)
			if !ok || !free(first) || !free(second) {
				continue
			}
			paste(a, first)
			paste(b, second)
			placed = true
		}
		if !placed {
			return Scene{}, false
		}
	}
	for len(s.Objects) < n {
		placed := false
		for try := 0; try < tries && !placed; try++ {
			it, ok := any()
			if !ok {
				continue
			}
			if b := anywhere(it); free(b) {
				paste(it, b)
				placed = true
			}
		}
		if !placed {
			return Scene{}, false
		}
	}
	return s, true
}

// beside places an item in a random direction from a box, as far off as gives the wanted IoU (within 0.02 of it, after
// rounding to whole pixels, and never outside [0.3, 0.65]).
func (c SceneConfig) beside(r *rand.Rand, a Rect, it item, want float64) (Rect, bool) {
	angle := 2 * math.Pi * r.Float64()
	dx, dy := math.Cos(angle), math.Sin(angle)
	at := func(d float64) Rect {
		return Rect{
			math.Round(a.X + (a.W-float64(it.w))/2 + d*dx), math.Round(a.Y + (a.H-float64(it.h))/2 + d*dy),
			float64(it.w), float64(it.h),
		}
	}
	lo, hi := 0., 2*float64(c.Size) // overlap falls with the distance
	for range 20 {
		mid := (lo + hi) / 2
		if IoU(a.Corners(), at(mid).Corners(), false) > want {
			lo = mid
		} else {
			hi = mid
		}
	}
	best, found := Rect{}, math.Inf(1)
	for _, d := range []float64{lo, hi} {
		b := at(d)
		o := IoU(a.Corners(), b.Corners(), false)
		inside := b.X >= 0 && b.Y >= 0 && b.X+b.W <= float64(c.Size) && b.Y+b.H <= float64(c.Size)
		if inside && o >= 0.3 && o <= 0.65 && math.Abs(o-want) < found {
			best, found = b, math.Abs(o-want)
		}
	}
	return best, found <= 0.02
}
