package curate

import (
	"context"
	"errors"
	"image"
	"image/color"
	"testing"

	"gonum.org/v1/gonum/mat"
)

func shade(w, h int, f func(x, y float64) uint8) image.Image {
	m := image.NewGray(image.Rect(0, 0, w, h))
	for y := range h {
		for x := range w {
			m.SetGray(x, y, color.Gray{Y: f(float64(x)/float64(w), float64(y)/float64(h))})
		}
	}
	return m
}

func TestImageFeaturesGroupLookAlikes(t *testing.T) {
	// 8 pictures bright on the left and 8 bright at the top, of different sizes
	at := func(i int) (image.Image, error) {
		return shade(30+3*i, 50-i, func(x, y float64) uint8 {
			if i%2 == 0 {
				x = y
			}
			return uint8(200*(1-x)) + uint8(i)
		}), nil
	}
	f, err := ImageFeatures(context.Background(), 16, 8, at)
	if err != nil {
		t.Fatal(err)
	}
	if n, d := f.Dims(); n != 16 || d != 8 {
		t.Errorf("features are [%d %d], want [16 8]", n, d)
	}
	_, cl, err := PrototypeScores(f, 2, 0)
	if err != nil {
		t.Fatal(err)
	}
	for i, a := range cl.Assignment {
		if a != cl.Assignment[i%2] || cl.Assignment[0] == cl.Assignment[1] {
			t.Fatalf("clusters %v do not follow the look of the pictures", cl.Assignment)
		}
	}
	again, err := ImageFeatures(context.Background(), 16, 8, at)
	if err != nil || !mat.Equal(f, again) {
		t.Errorf("a second run gives other features (%v)", err)
	}
}

func TestImageFeaturesReportsErrors(t *testing.T) {
	broken := errors.New("broken.png: truncated")
	_, err := ImageFeatures(context.Background(), 50, 0, func(i int) (image.Image, error) {
		if i == 20 {
			return nil, broken
		}
		return shade(5, 5, func(x, _ float64) uint8 { return uint8(i) }), nil
	})
	if !errors.Is(err, broken) {
		t.Errorf("got %v, want the error of the picture", err)
	}
	_, err = ImageFeatures(context.Background(), 1, 0, func(int) (image.Image, error) { return image.NewGray(image.Rectangle{}), nil })
	refuses(t, "empty picture", err, "picture 0 is empty")
	_, err = ImageFeatures(context.Background(), 0, 0, nil)
	refuses(t, "no pictures", err, "no pictures")
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	if _, err = ImageFeatures(ctx, 3, 0, func(int) (image.Image, error) { return shade(2, 2, func(_, _ float64) uint8 { return 1 }), nil }); err == nil {
		t.Error("a cancelled context must stop the work")
	}
}
