"""The preconditioner: state, measuring, remembering, factorising, renewing."""
