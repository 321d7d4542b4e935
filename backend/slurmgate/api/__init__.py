"""The backend's two HTTP applications: one for the gate's notify calls, one for people.

They listen on unix sockets of their own with threads of their own, so that nobody's curiosity
delays a notify. Blueprints read the control loop's view or hand it an event; they hold no state.
"""
