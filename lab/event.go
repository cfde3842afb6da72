package lab

// EventKind says what an Event reports.
type EventKind int

// The events of a run, in the order in which a unit (one arm of one seed) has them.
const (
	UnitSkipped  EventKind = iota // found finished in the store
	UnitStarted                   // Units says how many there are in all, Index which this is
	UnitProgress                  // Done of Total steps
	UnitLog                       // Message
	UnitDone                      // finished and stored
	UnitFailed                    // Message is the error
)

// Event is what a run reports while it goes on.
type Event struct {
	Kind        EventKind
	Method, Arm string
	Seed        uint64
	Index       int // of this unit, from 0
	Units       int // in all
	Done, Total int // steps, for UnitProgress
	Message     string
}
