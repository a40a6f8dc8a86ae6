"""What protects participants, what attacks them, and what either costs: pairs around any method that averages."""
