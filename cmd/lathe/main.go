// Lathe takes a neural network through its life: choose the data, train it, make it smaller, run it, and measure what
// each published technique does to it.
package main

import "os"

func main() {
	os.Exit(run(os.Args[1:], os.Stdin, os.Stdout, os.Stderr))
}
